"""How many tokens a second are relayed, and at what price? `pdtasks bench stream`

A stub engine makes a token for each of many streams in each step; what is measured is all between
it and the bytes that an HTTP client has read.  A stream gets its next token when its client has
read the one before: so each token is an event of its own, as with an engine that is slower than
what relays its tokens, and none is counted that was not read.  (A server that is given more than it
can relay puts several tokens into one event: the later it is, the faster it would look.)  The
streams are two groups, each a step of the engine: one is computed while the other is relayed.

The stub is in the process where the engine's *client* is, our decode worker or vLLM's front end:
the socket between that and an engine's own process is not measured, on either side.  All streams of
all sides are open all the time, and one side after the other is made to go on for some steps: a
round takes seconds, so that whatever else happens on the machine meets all sides::

    stub            the engine core; in a decode worker of ours, and in vLLM's front end
    without_log     the same, and no attempt is told from another: what going on costs who is not
                    disturbed
    vllm_front      what `vllm serve` runs in front of its engine, with the stub in its place
    client          streams over plain sockets, so that it costs little
    stack           services, workers, API and front end
    run             the order of a run: one side after the other, in short rounds
    report          medians, and ratios of figures of the same round
    command         where a run has its folder
"""
