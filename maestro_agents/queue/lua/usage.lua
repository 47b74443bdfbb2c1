-- usage: what the log says was used, added to the counters of days, once. No stage changes.
-- KEYS  1 epoch  2 charged to  3 the counters of a day, and so on
-- ARGV  1 epoch  2 log position that this follows  3 the one that it reaches, then of each day: when it expires, number of counters,
--       counter and what to add, in pairs
-- Result  1, or 0 where a newer epoch rules or the log was counted from there already
if tonumber(redis.call('GET', KEYS[1]) or 0) > tonumber(ARGV[1]) then return 0 end
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[2] then return 0 end
local i = 4
for day = 3, #KEYS do
  local last = i + 2 * tonumber(ARGV[i + 1])
  for j = i + 2, last, 2 do redis.call('HINCRBY', KEYS[day], ARGV[j], ARGV[j + 1]) end
  redis.call('EXPIREAT', KEYS[day], ARGV[i])
  i = last + 2
end
redis.call('SET', KEYS[2], ARGV[3])
return 1
