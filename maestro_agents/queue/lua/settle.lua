-- settle: a draining reservation is free. No stage changes.
-- KEYS  1 draining  2 slots  3 kv  4 wake      ARGV  1 reservation id  2 engine  3 kv bytes
-- Result  1, or 0 where it was settled before
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HINCRBY', KEYS[2], ARGV[2], -1)
redis.call('HINCRBY', KEYS[3], ARGV[2], string.format('%.0f', 0 - tonumber(ARGV[3])))
if redis.call('LLEN', KEYS[4]) == 0 then redis.call('RPUSH', KEYS[4], '1') end
return 1
