-- requeue: GRANTED -> QUEUED under a new moment, before the first byte.
-- KEYS  1 stage  2 ready  3 leases  4 slots  5 kv  6 draining  7 wake  8 waits
-- ARGV  1 stage id  2 token  3 ticket  4 due  5 now  6 draining (1/0: the engine may still be computing)  7 client id
-- Result  1, or 0 where the grant is not ours any more
local stage = redis.call('HMGET', KEYS[1], 'status', 'token', 'engine', 'kv', 'client', 'whose')
if stage[1] ~= 'granted' or stage[2] ~= ARGV[2] or stage[5] ~= ARGV[7] then return 0 end
if ARGV[6] == '1' then
  redis.call('HSET', KEYS[6], ARGV[1] .. '#' .. stage[2], ARGV[5] .. ' ' .. stage[4] .. ' ' .. stage[3])
else
  redis.call('HINCRBY', KEYS[4], stage[3], -1)
  redis.call('HINCRBY', KEYS[5], stage[3], string.format('%.0f', 0 - tonumber(stage[4])))
end
redis.call('HSET', KEYS[1], 'status', 'queued', 'ticket', ARGV[3])
redis.call('HDEL', KEYS[1], 'engine', 'token', 'kv', 'granted_at', 'grant', 'fast')
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
if stage[6] then redis.call('ZADD', KEYS[8], 0, stage[6] .. '|' .. ARGV[1]) end
if redis.call('LLEN', KEYS[7]) == 0 then redis.call('RPUSH', KEYS[7], '1') end
return 1
