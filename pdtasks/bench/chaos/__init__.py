"""Does a stack keep its promise (docs/guarantees.md) while its parts fail? `pdtasks bench chaos`

::

    schedule   which fault when, from a seed
    questions  what is asked, from a seed
    load       clients that ask all the time, and note what they see
    tally      what became of each request, and how long its client waited
    faults     what each fault does, and undoes
    stack      the stack of its own that all of it acts on
    stub       an engine that computes nothing and repeats itself
    nursery    starts stub workers and API processes within a moment
    run        the order of a run
    report     what is shown of it
"""
