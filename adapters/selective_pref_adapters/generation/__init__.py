"""Answers to the questions of Arena-Hard and MT-Bench, in the files that the benchmarks' own code reads.

    questions     a benchmark's question file → questions
    local         questions → answers of a model on this process, in batches
    served        the same of a server that speaks OpenAI's chat protocol
    records       an answer → the line that a benchmark reads
    style         what Arena-Hard's style control reads of an answer: its length, its headers, lists and bold words
    answer_file   which answers are there already; those that come in; the whole file at the end
    command       `selective-pref generate`

Judging is not done here: the benchmarks' own code does it.
"""
