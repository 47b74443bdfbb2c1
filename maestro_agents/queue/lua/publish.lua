-- publish: the fleet, its credits and each role's p99, under an epoch. No stage changes.
-- KEYS  1 epoch  2 credits  3 p99  4 fleet
-- ARGV  1 epoch  2 valid until  3 fleet (JSON)  4 number of engines  5 engine, slots, kv bytes, in threes,
--       then role key, p99 output tokens, in pairs
-- Result  1, or 0 where a newer epoch rules
if tonumber(redis.call('GET', KEYS[1]) or 0) > tonumber(ARGV[1]) then return 0 end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'epoch', ARGV[1], 'until', ARGV[2])
local n = tonumber(ARGV[4])
for i = 5, 4 + 3 * n, 3 do
  redis.call('HSET', KEYS[2], ARGV[i] .. ':slots', ARGV[i + 1], ARGV[i] .. ':kv', ARGV[i + 2])
end
for i = 5 + 3 * n, #ARGV, 2 do redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1]) end
redis.call('SET', KEYS[4], ARGV[3])
return 1
