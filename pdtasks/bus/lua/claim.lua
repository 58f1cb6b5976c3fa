-- Give the job that nobody runs and whose turn it is (`create`) to the runner with this token. Returns
-- its id, or nothing.

local running, waiting = KEYS[1], KEYS[2]
local prefix, token, lease_s, most_attempts = unpack(ARGV)

while true do
  -- First those whose runner was lost.
  local id = redis.call('ZRANGE', running, '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)[1]
  if not id then id = redis.call('ZPOPMIN', waiting)[1] end
  if not id then return nil end
  local record = prefix .. id
  -- What is no record fails here, and is forgotten as if it had expired.
  local is_record = type(redis.pcall('HGET', record, 'state')) == 'string'
  if is_record then
    redis.call('ZADD', running, now + lease_s, id)
    keep(running, record)
    redis.call('HSET', record, 'token', token)
    local begun = tonumber(redis.call('HGET', record, 'attempts')) or 0
    local handed_over = tonumber(redis.call('HGET', record, 'handed_over') or 0) or 0
    if begun - handed_over < tonumber(most_attempts) then
      redis.pcall('HINCRBY', record, 'attempts', 1) -- who claims cannot read it if this fails
    else
      redis.call('HSET', record, 'given_up', '1')
    end
    return id
  end
  redis.call('ZREM', running, id)
end
