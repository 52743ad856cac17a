"""A reference that another process serves over HTTP fills the store.

In: the address of a server that speaks OpenAI's completions protocol, and rows of token ids. Out: the log-probs that
the served model gives to them, checked token by token. Two ways of asking:

    completions      `echo` and `logprobs`: the prompt comes back with a log-prob for each of its tokens
    prompt_logprobs  vLLM's own: for each position, log-probs by token id

    server      the address, the headers, and what must never be printed
    probe       a few short requests before the first row: is this model served, with this tokenizer?
    answers     one request, and the checks of its answer
    fill        several requests at once, repeated where one fails; the log-probs go into the store
"""

from selective_pref_adapters.reference_store.served.fill import fill_from_server, served_logps, served_space
from selective_pref_adapters.reference_store.served.server import Protocol, Server, ServerError

__all__ = ["Protocol", "Server", "ServerError", "fill_from_server", "served_logps", "served_space"]
