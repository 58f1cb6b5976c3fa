-- Take a job in, or find the one that came under the same key before. Returns 'digest id', or what
-- there is no room for: 'jobs' or 'memory'.

local record, all, waiting, turns = unpack(KEYS, 1, 4)
local idempotency = KEYS[5] -- or none
local prefix, id, owner, digest, ttl_s, most_forgotten = unpack(ARGV, 1, 6)
local most_waiting, most_memory = unpack(ARGV, 7, 8) -- (a part of maxmemory); then fields and values

local function lacks()
  if redis.call('ZCARD', waiting) >= tonumber(most_waiting) then return 'jobs' end
  if not has_room(most_memory, 0) then return 'memory' end
end

-- What waits is claimed by turns, not by time: an owner's next job has the turn behind his last one's,
-- or that of the job which is the next, if his last ones had theirs.  So owners come one by one, however
-- many jobs each of them has.
local function turn()
  local head = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')[2]
  if not head then redis.call('PEXPIRE', turns, 0) end -- all have had theirs
  local his = redis.pcall('HGET', turns, owner)
  his = type(his) == 'string' and tonumber(his) or 0
  local found = math.max(tonumber(head or now), his)
  redis.pcall('HSET', turns, owner, found + 1)
  return found
end

if idempotency then
  local known = redis.pcall('GET', idempotency)
  local of = type(known) == 'string' and string.match(known, '^%x+ (job%-%x+)$')
  -- A job that ends early expires before its key.
  if of and redis.call('EXISTS', prefix .. of) == 1 then return known end
end
local lacking = lacks()
if lacking then return lacking end
if idempotency then
  redis.call('SET', idempotency, digest .. ' ' .. id, 'EX', ttl_s)
end
redis.call('HSET', record, unpack(ARGV, 9))
redis.call('EXPIRE', record, ttl_s)
redis.call('ZADD', all, now, id)
redis.call('ZADD', waiting, turn(), id)
for _, index in ipairs({all, waiting, turns}) do keep(index, record) end
-- The oldest names whose records have expired.
for _, name in ipairs(redis.call('ZRANGE', all, 0, most_forgotten - 1)) do
  if redis.call('EXISTS', prefix .. name) == 1 then break end
  redis.call('ZREM', all, name)
  redis.call('ZREM', waiting, name)
end
return digest .. ' ' .. id
