"""Opens pages in a real browser, Chromium, over its debugging pipe.

    browser.py CHROMIUM AXE JOB.json

AXE is axe-core's axe.min.js. JOB has `pages`, addresses to open; `ask`, pages that classify: each has a `place`,
an address or a folder of such a page, which is served, and `pictures`, files to give it;
`shots`, a folder for screenshots, or null. Prints, as JSON, of each page what it said on the console, what axe-core finds that is serious,
by how many pixels it is wider than a phone's screen, the bytes that it took, its title, its verdict, its
charts, how many pictures it shows, and where the first Tab leads; and the
logits of each picture.
"""

import base64
import functools
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
--disable-sync --disable-dev-shm-usage --remote-debugging-pipe""".split()
DEADLINE = 60.0
PHONE, DESK = 360, 1280


class Browser:
    """One tab."""

    def __init__(self, chromium, folder):
        read_end, self.output = os.pipe()
        self.input, write_end = os.pipe()
        # The browser reads commands at 3 and writes answers at 4.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{read_end} 4>&{write_end}', chromium, *FLAGS, f"--user-data-dir={folder}"]
        log = open(Path(folder) / "log", "w")
        self.process = subprocess.Popen(command, pass_fds=(read_end, write_end), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        os.close(read_end)
        os.close(write_end)
        os.set_blocking(self.input, False)
        self.rest, self.events, self.sent, self.session = b"", [], 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(domain + ".enable")

    def messages(self, until):
        """Waits for what the browser says next."""
        while b"\0" not in self.rest:
            try:
                part = os.read(self.input, 1 << 20)
                assert part, "the browser has ended"
                self.rest += part
            except BlockingIOError:
                assert time.monotonic() < until, "the browser does not answer"
                time.sleep(0.005)
        *whole, self.rest = self.rest.split(b"\0")
        return [json.loads(message) for message in whole]

    def call(self, method, **parameters):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + DEADLINE
        while True:
            answer = None
            for said in self.messages(until):
                if said.get("id") == self.sent:
                    answer = said
                elif "method" in said:
                    self.events.append(said)
            if answer:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def evaluate(self, script):
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def eventually(self, what, script):
        until = time.monotonic() + DEADLINE
        while not (value := self.evaluate(script)):
            assert time.monotonic() < until, f"{what} did not come: {self.evaluate('document.body.innerText')[:2000]}"
            time.sleep(0.02)
        return value

    def width(self, pixels):
        self.call("Emulation.setDeviceMetricsOverride", width=pixels, height=800, deviceScaleFactor=1, mobile=pixels < 600)

    def open(self, address, pixels=DESK):
        """Opens a page; what it said and what it took stand in `events` from then on."""
        self.width(pixels)
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.eventually("the page", f"document.readyState === 'complete' && location.href === {json.dumps(address)}")

    def complaints(self):
        """What stands on the console that should not, and what was thrown."""
        self.evaluate("1")
        found = []
        for event in self.events:
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                found.append(str(parameters["args"]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(parameters["entry"]["text"] + " " + parameters["entry"].get("url", ""))
        return found

    def bytes(self):
        return sum(event["params"]["encodedDataLength"] for event in self.events if event["method"] == "Network.loadingFinished")

    def shot(self, file):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 2400), "scale": 1}
        image = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        Path(file).write_bytes(base64.b64decode(image["data"]))


def look(browser, address, axe, shots, number):
    browser.open(address)
    if address.endswith("/mistakes"):
        browser.eventually("what the network sees", "!document.getElementById('main').hasAttribute('data-live')")
    loaded = browser.bytes()
    found = browser.evaluate(
        axe + "; axe.run(document, {resultTypes: ['violations']}).then((result) => result.violations"
        ".filter((violation) => ['serious', 'critical'].includes(violation.impact))"
        ".map((violation) => violation.id + ': ' + violation.nodes.map((node) => node.html).slice(0, 3).join(' ')))"
    )
    # Pictures are loaded when they come into view; here all at once.
    browser.evaluate("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
    browser.eventually("all pictures", "[...document.images].every((image) => image.complete)")
    pictures = browser.evaluate("[...document.querySelectorAll('.sheet img')].filter((image) => image.naturalWidth > 0).length")
    charts = browser.evaluate(
        "[...document.querySelectorAll('.chart > svg')].map((svg) => [...svg.querySelectorAll('polyline')].filter((line) => line.getTotalLength() > 0).length)"
    )
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    focused = browser.evaluate("document.activeElement.className")
    if shots:
        browser.shot(Path(shots) / f"{number}.png")
    browser.width(PHONE)
    wider = browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return {
        "address": address,
        "console": browser.complaints(),
        "serious": found,
        "wider": wider,
        "bytes": loaded,
        "title": browser.evaluate("document.title"),
        "verdict": browser.evaluate("(document.querySelector('.verdict') || document.body).innerText"),
        "pictures": pictures,
        "charts": charts,
        "focused": focused,
    }


def ask(browser, address, pictures, shots):
    browser.open(address, PHONE)
    browser.eventually("the model", "document.getElementById('try') && document.getElementById('try').dataset.ready")
    browser.evaluate("globalThis.told = []; document.addEventListener('classified', ({detail}) => told.push([[...detail.logits], detail.millis])); 1")
    answers = []
    for picture in pictures:
        document = browser.call("DOM.getDocument")["root"]["nodeId"]
        node = browser.call("DOM.querySelector", nodeId=document, selector="#files")["nodeId"]
        browser.call("DOM.setFileInputFiles", nodeId=node, files=[picture])
        # A listener of its own asks for the change; setting files raises it.
        browser.eventually(f"an answer to {picture}", f"told.length > {len(answers)}")
        logits, millis = browser.evaluate("told.at(-1)")
        answers.append({"picture": picture, "logits": logits, "millis": millis, "first": browser.evaluate("document.querySelector('#answers li').innerText")})
    if shots:
        browser.shot(Path(shots) / "ask.png")
    wider = browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return {"answers": answers, "console": browser.complaints(), "wider": wider, "bytes": browser.bytes(), "status": browser.evaluate("document.getElementById('status').innerText")}


def served(place):
    if place.startswith("http"):
        return place
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=place)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/index.html"


def main():
    chromium, axe, job = sys.argv[1], Path(sys.argv[2]).read_text(), json.loads(Path(sys.argv[3]).read_text())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(chromium, folder)
        try:
            pages = [look(browser, address, axe, job["shots"], number) for number, address in enumerate(job["pages"])]
            asked = [ask(browser, served(page["place"]), page["pictures"], job["shots"]) for page in job["ask"]]
            print(json.dumps({"pages": pages, "ask": asked}))
        finally:
            browser.process.kill()
            browser.process.wait()


main()
