-- grant: QUEUED -> GRANTED, decided by the leader of the current epoch; QUEUED -> LOST where the client is dead.
-- KEYS  1 stage  2 ready  3 leases  4 clients  5 slots  6 kv  7 credits  8 epoch  9 fence  10 inbox  11 waits
-- ARGV  1 stage id  2 engine  3 kv bytes  4 epoch  5 now  6 lease until  7 grant without its token (JSON)
--       8 seconds that the inbox lives  9 seconds that a record of the end lives  10 nested (1/0: has no bounds)
-- Result  token, or nil: no longer waiting, client dead, credits spent, newer epoch
local stage = redis.call('HMGET', KEYS[1], 'status', 'client', 'whose')
if stage[1] ~= 'queued' or redis.call('GET', KEYS[8]) ~= ARGV[4] then return nil end
local alive = redis.call('ZSCORE', KEYS[4], stage[2])
if not alive or tonumber(alive) <= tonumber(ARGV[5]) then
  redis.call('HSET', KEYS[1], 'status', 'lost')
  redis.call('EXPIRE', KEYS[1], ARGV[9])
  redis.call('ZREM', KEYS[2], ARGV[1])
  if stage[3] then redis.call('ZREM', KEYS[11], stage[3] .. '|' .. ARGV[1]) end
  return nil
end
local cap = redis.call('HMGET', KEYS[7], ARGV[2] .. ':slots', ARGV[2] .. ':kv')
if not cap[1] then return nil end
local total = tonumber(cap[2])
local full = tonumber(redis.call('HGET', KEYS[5], ARGV[2]) or 0) >= tonumber(cap[1])
  or (total > 0 and tonumber(redis.call('HGET', KEYS[6], ARGV[2]) or 0) + tonumber(ARGV[3]) > total)
if full and ARGV[10] ~= '1' then return nil end
local token = redis.call('INCR', KEYS[9])
redis.call('HINCRBY', KEYS[5], ARGV[2], 1)
redis.call('HINCRBY', KEYS[6], ARGV[2], ARGV[3])
redis.call('HSET', KEYS[1], 'status', 'granted', 'engine', ARGV[2], 'token', token, 'epoch', ARGV[4],
  'kv', ARGV[3], 'granted_at', ARGV[5], 'fast', '0', 'grant', ARGV[7])
redis.call('ZREM', KEYS[2], ARGV[1])
if stage[3] then redis.call('ZREM', KEYS[11], stage[3] .. '|' .. ARGV[1]) end
redis.call('ZADD', KEYS[3], ARGV[6], ARGV[1])
redis.call('RPUSH', KEYS[10], token .. ' ' .. ARGV[7])
redis.call('EXPIRE', KEYS[10], ARGV[8])
return token
