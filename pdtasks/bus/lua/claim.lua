-- Give the oldest job that nobody runs to the runner with this token. Returns its id, or nothing.

local running, waiting = KEYS[1], KEYS[2]
local prefix, token, lease_s, most_attempts = unpack(ARGV)

while true do
  -- First those whose runner was lost.
  local id = redis.call('ZRANGE', running, '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)[1]
  if not id then id = redis.call('ZPOPMIN', waiting)[1] end
  if not id then return nil end
  local record = prefix .. id
  if redis.call('EXISTS', record) == 1 then
    redis.call('ZADD', running, now + lease_s, id)
    keep(running, record)
    redis.call('HSET', record, 'token', token)
    local begun = tonumber(redis.call('HGET', record, 'attempts'))
    local handed_over = tonumber(redis.call('HGET', record, 'handed_over') or 0)
    if begun - handed_over < tonumber(most_attempts) then
      redis.call('HINCRBY', record, 'attempts', 1)
    else
      redis.call('HSET', record, 'given_up', '1')
    end
    return id
  end
  redis.call('ZREM', running, id)
end
