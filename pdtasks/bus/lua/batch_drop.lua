-- End lines that nobody runs with one error each. Returns how many, or -1 when another one tends the batch.

local record, lines, running, held, tries = unpack(KEYS)
local files, token, lease_s, most, code, message = unpack(ARGV)

if redis.call('HGET', record, 'token') ~= token then return -1 end
redis.call('HSET', record, 'lease_until', now + lease_s)
for dropped = 0, most - 1 do
  local entry = redis.call('ZRANGE', running, '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)[1]
  if entry then redis.call('ZREM', running, entry) else entry = redis.call('LPOP', lines) end
  if not entry then return dropped end
  local number, _, _, custom_id = unpack(cjson.decode(entry))
  redis.call('HDEL', held, number)
  redis.call('HDEL', tries, number)
  local text = cjson.encode({
    id = redis.call('HGET', record, 'request_prefix') .. number,
    custom_id = custom_id,
    response = cjson.null,
    error = {code = code, message = message},
  })
  append(record, files, 'error', text .. '\n')
  redis.call('HINCRBY', record, 'failed', 1)
end
return tonumber(most)
