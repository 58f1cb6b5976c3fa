-- Give a batch that needs more than its lines being run to who has this token. Returns its id, or nothing.

local open = KEYS[1]
local prefix, token, lease_s = unpack(ARGV)

for _, id in ipairs(redis.call('ZRANGE', open, 0, -1)) do
  local record = prefix .. id
  local found = redis.pcall('HMGET', record, 'status', 'expires_at', 'lease_until')
  local status, expires_at, free_at = unpack(found) -- (nothing of what is no record)
  if not status then
    redis.call('ZREM', open, id)
  elseif tonumber(free_at or 0) <= now then
    local has_lines = redis.call('LLEN', record .. ':lines') + redis.call('ZCARD', record .. ':running')
    if status ~= 'in_progress' or has_lines == 0 or tonumber(expires_at) <= now then
      redis.call('HSET', record, 'token', token, 'lease_until', now + lease_s)
      return id
    end
  end
end
return nil
