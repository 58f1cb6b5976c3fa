-- End a job once. Returns 0 when another one runs it, or there is none.

local record, events, running, waiting, all, turns = unpack(KEYS)
local id, token, ttl_s = ARGV[1], ARGV[2], ARGV[3] -- then fields and values, `finished_at` with them

if redis.call('EXISTS', record) == 0 then return 0 end
-- A job that nobody runs has no token.
if (redis.call('HGET', record, 'token') or '') ~= token then return 0 end
redis.call('ZREM', running, id)
if redis.call('ZREM', waiting, id) == 1 then -- it did not need its turn: the owner's next has one less to wait for
  local owner = redis.call('HGET', record, 'owner') or ''
  local his = redis.pcall('HGET', turns, owner)
  if type(his) == 'string' and tonumber(his) then redis.call('HSET', turns, owner, his - 1) end
end
if redis.call('HEXISTS', record, 'finished_at') == 1 then return 1 end
redis.call('HSET', record, 'token', '', unpack(ARGV, 4))
redis.pcall('XADD', events, '*', 'end', redis.call('HGET', record, 'state')) -- if it is a stream
redis.call('EXPIRE', record, ttl_s)
redis.call('EXPIRE', events, ttl_s)
keep(all, record)
return 1
