"""How fast are the parts, on this host, beside what limits them? `pdtasks bench …`

::

    chaos    what becomes of requests while parts of a stack fail
    control  publishes, hops and results without an engine, beside a stock Celery chain
    stream   tokens from a stub engine, relayed to HTTP clients, beside vLLM's front end
    overload what becomes of requests that are too many
    serving  pdtasks beside vLLM's own ways to serve
    gap      from the first token to the second, of a running stack
    burst    many requests at once to a running stack
    kv       KV blocks through Valkey: the method, and what is measured
    links    one connection of each way that is compared
    peer     the other end of the plain sockets, a process of its own
    report   the figures as a table, as ratios and as JSON
    plot     the figures as a picture
"""
