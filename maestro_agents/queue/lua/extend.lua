-- extend: the reservation of a granted stage grows to a total. No stage changes its status.
-- KEYS  1 stage  2 kv  3 credits
-- ARGV  1 token  2 kv bytes in all  3 client id
-- Result  1 it fits, 0 it is more than the engine has, nil where the grant is not ours any more
local stage = redis.call('HMGET', KEYS[1], 'status', 'token', 'engine', 'kv', 'client')
if stage[1] ~= 'granted' or stage[2] ~= ARGV[1] or stage[5] ~= ARGV[3] then return nil end
local more = math.max(0, tonumber(ARGV[2]) - tonumber(stage[4]))
local held = redis.call('HINCRBY', KEYS[2], stage[3], string.format('%.0f', more))
if more > 0 then redis.call('HSET', KEYS[1], 'kv', ARGV[2]) end
local total = tonumber(redis.call('HGET', KEYS[3], stage[3] .. ':kv') or 0)
return (total == 0 or held <= total) and 1 or 0
