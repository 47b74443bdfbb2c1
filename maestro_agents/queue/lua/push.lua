-- push: None -> QUEUED, or None -> GRANTED on the fast path (see ports.Queue.push).
-- KEYS  1 stage  2 ready  3 leases  4 clients  5 slots  6 kv  7 credits  8 p99  9 epoch  10 fence  11 wake
--       12 waits
-- ARGV  1 stage id  2 client id  3 ticket  4 due  5 now  6 alive until  7 model  8 role key  9 prompt tokens
--       10 max tokens (-1: none)  11 nested (1/0)  12 max queue  13 default p99  14 choices  15 tenant  16 first engine id,
--       17 its bytes per token  18 its max model length  19 its tokens per block  20 its window in tokens
--       21 its windowed bytes per token, and so on in sixes
-- Result  {"granted", engine, token, epoch, kv bytes, granted at, lease until, "0" or "1" (it came by the fast path),
--         what else its grant says (JSON)}; {"queued"}, {"known"}, {"full", seconds}, or {"quota", seconds}: too many of its tenant wait
local status, client = unpack(redis.call('HMGET', KEYS[1], 'status', 'client'))
if status == 'granted' and client == ARGV[2] then
  local g = redis.call('HMGET', KEYS[1], 'engine', 'token', 'epoch', 'kv', 'granted_at', 'fast', 'grant')
  return {'granted', g[1], g[2], g[3], g[4], g[5], redis.call('ZSCORE', KEYS[3], ARGV[1]), g[6] or '0', g[7] or '{}'}
elseif status then
  return {'known'}
end
redis.call('ZADD', KEYS[4], ARGV[6], ARGV[2])

local nested = ARGV[11] == '1'
local waiting = redis.call('ZCARD', KEYS[2])
local epoch = redis.call('GET', KEYS[9]) or '0'
local credit = redis.call('HMGET', KEYS[7], 'epoch', 'until', 'wait|' .. ARGV[7], 'tenant|' .. ARGV[15])
local metered, most, again = '0', '0', '0'
if credit[4] and not nested then metered, most, again = string.match(credit[4], '(%S+) (%S+) (%S+)') end
local best, best_free, best_kv, best_out = nil, 0, 0, 0
if credit[1] == epoch and tonumber(ARGV[5]) < tonumber(credit[2]) and (nested or (waiting == 0 and metered == '0')) then
  local out = tonumber(redis.call('HGET', KEYS[8], ARGV[8]) or ARGV[13])
  local bound = tonumber(ARGV[10])
  if bound >= 0 and bound < out then out = bound end
  local choices = tonumber(ARGV[14])
  for i = 16, #ARGV, 6 do
    local id = ARGV[i]
    local cap = redis.call('HMGET', KEYS[7], id .. ':slots', id .. ':kv')
    if cap[1] then
      local prompt, each, longest = tonumber(ARGV[9]), math.ceil(out), tonumber(ARGV[i + 2])
      if longest > 0 then
        prompt = math.min(prompt, longest)
        each = math.min(each, longest - prompt)
      end
      local size, window = tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4]) -- as core.EngineSpec.kv_bytes_of
      local shared = math.floor(prompt / size)
      local blocks = shared + choices * math.ceil((prompt - shared * size + each) / size)
      local held = blocks
      if window > 0 then held = math.min(blocks, choices * (math.ceil((window - 1) / size) + 1)) end
      local kv = size * (blocks * tonumber(ARGV[i + 1]) - (blocks - held) * tonumber(ARGV[i + 5]))
      local free = tonumber(cap[1]) - tonumber(redis.call('HGET', KEYS[5], id) or 0)
      local total = tonumber(cap[2])
      local fits = total == 0 or tonumber(redis.call('HGET', KEYS[6], id) or 0) + kv <= total
      if (nested or (free > 0 and fits)) and (best == nil or free > best_free) then
        best, best_free, best_kv, best_out = id, free, kv, choices * each
      end
    end
  end
end

local whose = #ARGV[15] .. ':' .. ARGV[15]
if best then
  local token = redis.call('INCR', KEYS[10])
  local kv = string.format('%.0f', best_kv)
  local grant = string.format('{"output_tokens":%.0f}', best_out)
  redis.call('HINCRBY', KEYS[5], best, 1)
  redis.call('HINCRBY', KEYS[6], best, kv)
  redis.call('HSET', KEYS[1], 'status', 'granted', 'ticket', ARGV[3], 'client', ARGV[2], 'model', ARGV[7],
    'engine', best, 'token', token, 'epoch', epoch, 'kv', kv, 'granted_at', ARGV[5], 'fast', '1',
    'grant', grant)
  if not nested then redis.call('HSET', KEYS[1], 'whose', whose) end
  redis.call('ZADD', KEYS[3], ARGV[6], ARGV[1])
  return {'granted', best, tostring(token), epoch, kv, ARGV[5], ARGV[6], '1', grant}
end
if waiting >= tonumber(ARGV[12]) then return {'full', credit[3] or '0'} end
if tonumber(most) > 0 and redis.call('ZLEXCOUNT', KEYS[12], '[' .. whose .. '|', '(' .. whose .. '}') >= tonumber(most) then
  return {'quota', again}
end
redis.call('HSET', KEYS[1], 'status', 'queued', 'ticket', ARGV[3], 'client', ARGV[2], 'model', ARGV[7])
if not nested then
  redis.call('HSET', KEYS[1], 'whose', whose)
  redis.call('ZADD', KEYS[12], 0, whose .. '|' .. ARGV[1])
end
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
if redis.call('LLEN', KEYS[11]) == 0 then redis.call('RPUSH', KEYS[11], '1') end
return {'queued'}
