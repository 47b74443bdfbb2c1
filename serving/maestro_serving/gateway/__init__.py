"""The gateway: an OpenAI-compatible server in front of the fleet, for everybody who is not a Python LangGraph app.

One more client of the same queue (`maestro_agents.client`): its callers know one URL and one key, and see neither Redis nor
an engine.

    server.py     sockets, time-outs, an orderly end
    app.py        paths, who may call (keys), what is wrong with a request, errors in OpenAI's shape, metrics
    identity.py   whose run a call belongs to: said by its caller, or inferred from the conversation
    relay.py      one call's way: ticket, grant, engine, and the bytes of its answer through
    keys.py       the keys of tenants
"""
