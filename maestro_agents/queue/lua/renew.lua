-- renew: the client lives and still holds its stages; no stage changes its status.
-- KEYS  1 clients  2 leases  3 epoch  4 leader  5.. one stage each
-- ARGV  1 client id  2 alive until  3 now  4 stage id, 5 its token (0: it waits), and so on in pairs
-- Result  {epoch, led (1/0), "gone" or "granted", stage id, ...}
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
local led = redis.call('HGET', KEYS[4], 'until')
local result = {redis.call('GET', KEYS[3]) or '0', (led and tonumber(led) > tonumber(ARGV[3])) and 1 or 0}
for i = 5, #KEYS do
  local id, token = ARGV[2 * i - 6], ARGV[2 * i - 5]
  local stage = redis.call('HMGET', KEYS[i], 'status', 'token', 'client')
  if stage[3] ~= ARGV[1] then
    result[#result + 1] = 'gone'; result[#result + 1] = id
  elseif stage[1] == 'granted' and (token == '0' or token == stage[2]) then
    redis.call('ZADD', KEYS[2], ARGV[2], id)
    if token == '0' then result[#result + 1] = 'granted'; result[#result + 1] = id end
  elseif not (stage[1] == 'queued' and token == '0') then
    result[#result + 1] = 'gone'; result[#result + 1] = id
  end
end
return result
