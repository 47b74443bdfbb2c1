-- log: an entry that ends no stage of the queue; no stage changes its status.
-- KEYS  1 log
-- ARGV  1 "o" (an observation) or "r" (the end of a run)  2 entry (JSON)  3 log length
-- Result  the entry's position
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[3], '*', ARGV[1], ARGV[2])
