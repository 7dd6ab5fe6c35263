"""Several processes on one port: one writes, the others answer searches and matches from the galleries that it writes.

Each listens on the same port, and the system gives every new connection to one of them. A replica follows the writer's
galleries, so that a read sees every write that was acknowledged before it, whichever processes answered the two; all
calls but those of MatchService and SearchService it passes on to the writer, through a socket that only this user can
open. The parent starts them, starts anew what dies, and has all drain at once when it is told to stop. All change
their models together; see `models.py`.
"""
