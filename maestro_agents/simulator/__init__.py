"""The same policies on a virtual clock. `engine` is one vLLM engine as a model; the emulator runs it in real time."""
