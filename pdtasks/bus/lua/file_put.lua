-- Keep one piece of a file that is on its way. Returns 0 when the bus has no room for it.

local piece, data, ttl_s, most_memory = KEYS[1], ARGV[1], ARGV[2], ARGV[3]

if not has_room(most_memory, #data) then return 0 end
redis.call('SET', piece, data, 'EX', ttl_s)
return 1
