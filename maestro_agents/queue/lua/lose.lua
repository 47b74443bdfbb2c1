-- lose: GRANTED -> LOST once its lease expired (the reservation drains), QUEUED -> LOST once its client is dead.
-- KEYS  1 stage  2 ready  3 leases  4 clients  5 draining  6 waits
-- ARGV  1 stage id  2 now  3 record seconds
-- Result  1, or 0 where somebody still holds it
local stage = redis.call('HMGET', KEYS[1], 'status', 'token', 'engine', 'kv', 'client', 'whose')
local now = tonumber(ARGV[2])
if stage[1] == 'granted' then
  local lease = redis.call('ZSCORE', KEYS[3], ARGV[1])
  if lease and tonumber(lease) > now then return 0 end
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('HSET', KEYS[5], ARGV[1] .. '#' .. stage[2], ARGV[2] .. ' ' .. stage[4] .. ' ' .. stage[3])
elseif stage[1] == 'queued' then
  local alive = redis.call('ZSCORE', KEYS[4], stage[5])
  if alive and tonumber(alive) > now then return 0 end
  redis.call('ZREM', KEYS[2], ARGV[1])
  if stage[6] then redis.call('ZREM', KEYS[6], stage[6] .. '|' .. ARGV[1]) end
else
  redis.call('ZREM', KEYS[3], ARGV[1])
  return 0
end
redis.call('HSET', KEYS[1], 'status', 'lost')
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
