-- report: a node's account of itself, in place of its last one. No stage changes.
-- KEYS  1 nodes  2 reports  3 wake      ARGV  1 node  2 now  3 until when it counts  4 report (JSON)
-- Result  nothing; the reports of nodes that have been silent for too long are gone
local silent = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[2])
for i = 1, #silent do
  redis.call('ZREM', KEYS[1], silent[i])
  redis.call('HDEL', KEYS[2], silent[i])
end
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[4])
if redis.call('LLEN', KEYS[3]) == 0 then redis.call('RPUSH', KEYS[3], '1') end
