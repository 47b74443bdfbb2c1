-- finish: GRANTED -> DONE or FAILED; the reservation is free, the observation is in the log.
-- KEYS  1 stage  2 leases  3 slots  4 kv  5 log  6 ready  7 wake
-- ARGV  1 stage id  2 token  3 status  4 observation (JSON)  5 log length  6 record seconds  7 client id
-- Result  1, or 0 where the grant is not ours any more
local stage = redis.call('HMGET', KEYS[1], 'status', 'token', 'engine', 'kv', 'client')
if stage[1] ~= 'granted' or stage[2] ~= ARGV[2] or stage[5] ~= ARGV[7] then return 0 end
redis.call('HSET', KEYS[1], 'status', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HINCRBY', KEYS[3], stage[3], -1)
redis.call('HINCRBY', KEYS[4], stage[3], string.format('%.0f', 0 - tonumber(stage[4])))
redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[5], '*', 'o', ARGV[4])
if redis.call('ZCARD', KEYS[6]) > 0 and redis.call('LLEN', KEYS[7]) == 0 then redis.call('RPUSH', KEYS[7], '1') end
return 1
