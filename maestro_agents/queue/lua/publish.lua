-- publish: the fleet, its credits, its tenants and each role's p99, under an epoch. No stage changes.
-- KEYS  1 epoch  2 credits  3 p99  4 fleet  5 tenants
-- ARGV  1 epoch  2 valid until  3 fleet (JSON)  4 tenants (JSON)  5 number of engines  6 number of notes
--       7 engine, slots, kv bytes, in threes, then what else push asks of the credits, field and value, in pairs,
--       then role key, p99 output tokens, in pairs
-- Result  1, or 0 where a newer epoch rules
if tonumber(redis.call('GET', KEYS[1]) or 0) > tonumber(ARGV[1]) then return 0 end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'epoch', ARGV[1], 'until', ARGV[2])
local notes = 7 + 3 * tonumber(ARGV[5])
local roles = notes + 2 * tonumber(ARGV[6])
for i = 7, notes - 1, 3 do
  redis.call('HSET', KEYS[2], ARGV[i] .. ':slots', ARGV[i + 1], ARGV[i] .. ':kv', ARGV[i + 2])
end
for i = notes, roles - 1, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
for i = roles, #ARGV, 2 do redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1]) end
redis.call('SET', KEYS[4], ARGV[3])
redis.call('SET', KEYS[5], ARGV[4])
return 1
