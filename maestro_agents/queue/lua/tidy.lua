-- tidy: what a former release, which did not know of it, left in the list of what waits. No stage changes.
-- KEYS  1 waits  2 the stage of an entry, and so on      ARGV  1 that entry, and so on
-- Result  how many were left over
local gone = 0
for i = 2, #KEYS do
  if redis.call('HGET', KEYS[i], 'status') ~= 'queued' then gone = gone + redis.call('ZREM', KEYS[1], ARGV[i - 1]) end
end
return gone
