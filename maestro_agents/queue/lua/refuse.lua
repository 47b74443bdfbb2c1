-- refuse: QUEUED -> REFUSED, and the client is told.
-- KEYS  1 stage  2 ready  3 inbox      ARGV  1 stage id  2 refusal (JSON)  3 inbox seconds  4 record seconds
-- Result  1, or 0 where it no longer waits
if redis.call('HGET', KEYS[1], 'status') ~= 'queued' then return 0 end
redis.call('HSET', KEYS[1], 'status', 'refused')
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('RPUSH', KEYS[3], '0 ' .. ARGV[2])
redis.call('EXPIRE', KEYS[3], ARGV[3])
return 1
