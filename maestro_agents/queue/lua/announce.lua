-- announce: None -> QUEUED or None -> GRANTED, for a store that forgot what a client waits for or holds; QUEUED -> GRANTED
-- for one that forgot the grant alone (a replica that took over a moment too early).
-- KEYS  1 stage  2 ready  3 leases  4 clients  5 slots  6 kv  7 fence  8 wake  9 waits
-- ARGV  1 stage id  2 client id  3 ticket  4 due  5 now  6 alive until  7 model  8 record seconds
--       9 token (0: it waits)  10 engine  11 kv bytes  12 granted at  13 epoch  14 fast (1/0)  15 grant (JSON)
--       16 tenant (empty: nested)
-- Result  1, or 0 where the stage is known
local status, client = unpack(redis.call('HMGET', KEYS[1], 'status', 'client'))
if status and (status ~= 'queued' or client ~= ARGV[2] or ARGV[9] == '0') then return 0 end
if status then
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('ZREM', KEYS[9], (redis.call('HGET', KEYS[1], 'whose') or '') .. '|' .. ARGV[1])
end
redis.call('ZADD', KEYS[4], ARGV[6], ARGV[2])
redis.call('HSET', KEYS[1], 'ticket', ARGV[3], 'client', ARGV[2], 'model', ARGV[7])
local whose = #ARGV[16] .. ':' .. ARGV[16]
if ARGV[16] ~= '' then redis.call('HSET', KEYS[1], 'whose', whose) end
if ARGV[9] == '0' then
  if ARGV[16] ~= '' then redis.call('ZADD', KEYS[9], 0, whose .. '|' .. ARGV[1]) end
  redis.call('HSET', KEYS[1], 'status', 'queued')
  redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
  if redis.call('LLEN', KEYS[8]) == 0 then redis.call('RPUSH', KEYS[8], '1') end
  return 1
end
if tonumber(redis.call('GET', KEYS[7]) or 0) < tonumber(ARGV[9]) then redis.call('SET', KEYS[7], ARGV[9]) end
redis.call('HSET', KEYS[1], 'status', 'granted', 'engine', ARGV[10], 'token', ARGV[9], 'kv', ARGV[11],
  'epoch', ARGV[13], 'granted_at', ARGV[12], 'fast', ARGV[14], 'grant', ARGV[15])
redis.call('HINCRBY', KEYS[5], ARGV[10], 1)
redis.call('HINCRBY', KEYS[6], ARGV[10], ARGV[11])
redis.call('ZADD', KEYS[3], ARGV[6], ARGV[1])
return 1
