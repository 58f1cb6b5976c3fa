-- Set fields of a batch, add lines to it. Returns 0 when another one tends it, or its status is another one.

local record, lines = KEYS[1], KEYS[2]
local token, status, lease_s, begins, num_fields = unpack(ARGV, 1, 5) -- then fields, values, and lines

local own, is = unpack(redis.call('HMGET', record, 'token', 'status'))
if own ~= token or is ~= status then return 0 end
redis.call('HSET', record, 'lease_until', now + lease_s)
if begins == '1' then redis.call('DEL', lines) end
local first_line = 6 + 2 * num_fields
if first_line > 6 then redis.call('HSET', record, unpack(ARGV, 6, first_line - 1)) end
if #ARGV >= first_line then
  redis.call('RPUSH', lines, unpack(ARGV, first_line))
  keep(lines, record)
end
return 1
