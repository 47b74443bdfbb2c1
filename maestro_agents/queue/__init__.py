"""The queue of a pool, behind `maestro_agents.ports.Queue`.

``memory`` is the specification and serves one process; ``redis`` keeps the same promises between processes, one Lua file
per command under ``lua/``; ``embedded`` finds or starts a Redis. Nothing is imported here, so that a process pays only
for the one it uses.
"""
