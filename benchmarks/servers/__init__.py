"""Servers measured over loopback from one closed-loop load generator: ours, and its peers, at equal recall.

`remote.measured` starts `load` as a process of its own, with the Python of an environment that has the peer's client;
`load` has one of the drivers start the peer's server, fill it, tune it to the recall, and ask it.
"""
