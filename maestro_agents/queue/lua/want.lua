-- want: what is wanted of a node from now on, whole, under an epoch. No stage changes.
-- KEYS  1 epoch  2 wanted:<node>      ARGV  1 epoch  2 what is wanted (JSON)
-- Result  1, or 0 where a newer epoch rules. The same words again are no new version
if tonumber(redis.call('GET', KEYS[1]) or 0) > tonumber(ARGV[1]) then return 0 end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if last[1] and last[1][2][2] == ARGV[2] then return 1 end
redis.call('XADD', KEYS[2], 'MAXLEN', 1, '*', 'w', ARGV[2])
return 1
