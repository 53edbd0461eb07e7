"""An event loop in a thread of its own, which also works where the caller's thread has a running one (a notebook)."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import wait
from typing import Any


class LoopThread:
    """An event loop that runs coroutines in a thread of its own, until `close`.

    All of them run in this one loop, because a connection ends with the loop that opened it. The loop is not in the
    caller's thread, because asyncio runs no loop in a thread that has a running one.
    """

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        # A daemon does not keep a process from ending if the caller forgets `close`.
        self._thread = threading.Thread(target=self._serve, name=type(self).__name__, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        # At its end, the runner cancels the tasks that are left, and closes the loop.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine, wait for it, and return its result.

        Functions that the coroutine calls run in this loop's thread. An interrupt (Ctrl-C) asks the coroutine to stop,
        and [`close`] waits until it has.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            # An interrupt that comes just before a wait does not end it, so no wait is long.
            while not wait([future], timeout=1).done:
                pass
            return future.result()
        finally:
            future.cancel()  # changes nothing if the work is done

    def close(self) -> None:
        """Cancel the tasks that are left, close the loop, and end the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
