-- Hand a job over to the next that claims; it counts as no lost attempt.

local record, running = KEYS[1], KEYS[2]
local id, token = unpack(ARGV)

if redis.call('HGET', record, 'token') == token then
  redis.call('HSET', record, 'token', '-')
  redis.call('HINCRBY', record, 'handed_over', 1)
  redis.call('ZADD', running, 0, id)
  keep(running, record)
end
