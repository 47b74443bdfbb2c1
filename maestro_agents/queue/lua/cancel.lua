-- cancel: QUEUED -> CANCELLED, GRANTED -> CANCELLED.
-- KEYS  1 stage  2 ready  3 leases  4 slots  5 kv  6 draining  7 wake  8 waits
-- ARGV  1 stage id  2 now  3 draining (1/0: its request had left)  4 record seconds  5 client id (empty: an operator)
-- Result  the status before, or nil where the stage is unknown or another client's
local stage = redis.call('HMGET', KEYS[1], 'status', 'token', 'engine', 'kv', 'client', 'whose')
if ARGV[5] ~= '' and stage[5] ~= ARGV[5] then return nil end
if stage[1] == 'queued' then
  redis.call('ZREM', KEYS[2], ARGV[1])
  if stage[6] then redis.call('ZREM', KEYS[8], stage[6] .. '|' .. ARGV[1]) end
elseif stage[1] == 'granted' then
  redis.call('ZREM', KEYS[3], ARGV[1])
  if ARGV[3] == '1' then
    redis.call('HSET', KEYS[6], ARGV[1] .. '#' .. stage[2], ARGV[2] .. ' ' .. stage[4] .. ' ' .. stage[3])
  else
    redis.call('HINCRBY', KEYS[4], stage[3], -1)
    redis.call('HINCRBY', KEYS[5], stage[3], string.format('%.0f', 0 - tonumber(stage[4])))
    if redis.call('LLEN', KEYS[7]) == 0 then redis.call('RPUSH', KEYS[7], '1') end
  end
else
  return stage[1]
end
redis.call('HSET', KEYS[1], 'status', 'cancelled')
redis.call('EXPIRE', KEYS[1], ARGV[4])
return stage[1]
