"""Between messages and the domain: what is parsed of requests, and what answers are formed of."""
