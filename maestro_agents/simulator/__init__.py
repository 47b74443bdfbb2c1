"""The same policies on a virtual clock. `engine` is one vLLM engine as a model, which the emulator runs in real time too; `world`
is the loop that plays workloads; `replay` plays a live pool's own record again.
"""
