-- refuse: QUEUED -> REFUSED, and the client is told.
-- KEYS  1 stage  2 ready  3 inbox  4 waits      ARGV  1 stage id  2 refusal (JSON)  3 inbox seconds  4 record seconds
-- Result  1, or 0 where it no longer waits
local stage = redis.call('HMGET', KEYS[1], 'status', 'whose')
if stage[1] ~= 'queued' then return 0 end
redis.call('HSET', KEYS[1], 'status', 'refused')
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('ZREM', KEYS[2], ARGV[1])
if stage[2] then redis.call('ZREM', KEYS[4], stage[2] .. '|' .. ARGV[1]) end
redis.call('RPUSH', KEYS[3], '0 ' .. ARGV[2])
redis.call('EXPIRE', KEYS[3], ARGV[3])
return 1
