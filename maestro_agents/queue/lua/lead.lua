-- lead: take or keep leadership; the epoch is its fencing token.
-- KEYS  1 leader  2 epoch  3 fence
-- ARGV  1 holder  2 now  3 until  4 epoch at least (0: no restart was noticed)  5 tokens to skip after a restart
-- Result  the epoch, or nil where another leads
local leader = redis.call('HMGET', KEYS[1], 'holder', 'until')
local ours = leader[1] == ARGV[1]
if leader[1] and not ours and tonumber(leader[2]) > tonumber(ARGV[2]) then return nil end
local epoch = tonumber(redis.call('GET', KEYS[2]) or 0)
if not ours then epoch = epoch + 1 end
if epoch < tonumber(ARGV[4]) then epoch = tonumber(ARGV[4]) end
if ARGV[4] ~= '0' then redis.call('INCRBY', KEYS[3], ARGV[5]) end
redis.call('SET', KEYS[2], string.format('%.0f', epoch))
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'until', ARGV[3])
return epoch
