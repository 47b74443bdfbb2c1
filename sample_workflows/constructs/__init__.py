"""Every construct that LangGraph has, each in one small program that knows nothing of Maestro.

Read one to see how Maestro sees a construct: which node path and role each of its calls has. `maestro bench matrix` runs all
of them in every mode, with Maestro and without, and compares. Each file has

``build(model=ChatOpenAI, *, is_async=False)``
    the graph. ``model`` makes a chat model (keyword arguments as `ChatOpenAI` takes them); server, key and model's name come
    from OPENAI_BASE_URL, OPENAI_API_KEY and MAESTRO_SAMPLE_MODEL. ``is_async``: nodes are coroutine functions, where that
    makes a difference. Agents of langchain also take ``middleware``.
``INPUT``, and ``RESUME`` where the graph stops for a human
    what it is run on. ``[[...]]`` in a text steers an emulated engine (`maestro_serving.answers`): a real model reads past it.
``CALLS``
    the model calls of one run, counted by hand: node path -> how many; (node path, role) where the role says more than
    the path, since the agent has a name.
"""
