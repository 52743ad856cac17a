"""What the method does, in miniature and from one command: a language in which it is known which tokens decide."""
