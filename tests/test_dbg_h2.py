from tests.test_node_vllm import *
async def test_dbg(fleet):
    async def one(p, n):
        t=time.monotonic(); r=await fleet.ask(1, n, priority=p); print("done", p, r.status_code, round(time.monotonic()-t,2), flush=True)
    ts=[asyncio.create_task(one(0,1900))]
    await asyncio.sleep(1.0)
    ts+= [asyncio.create_task(one(p,30)) for p in (5,1,-3)]
    t0=time.monotonic()
    while not all(t.done() for t in ts):
        t=time.monotonic(); l=await fleet.drivers["tiny.n.1"].look(); print(round(t-t0,2), round(time.monotonic()-t,2), l.running, l.waiting, l.healthy, flush=True); await asyncio.sleep(.2)
