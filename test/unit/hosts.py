"""Machines of a cluster on one computer: network namespaces with addresses of their own, joined by a bridge over links
that delay and lose. It needs Linux, root, the ip command and /dev/net/tun."""
import os
import shutil
import signal
import subprocess
import sys

import slow_link

CAN = (os.path.isdir("/proc/self/ns") and hasattr(os, "geteuid") and os.geteuid() == 0
       and shutil.which("ip") is not None and os.access(slow_link.TUN, os.R_OK | os.W_OK))

MTU = 9000  # as clusters have it
DELAY, LOSS = 0.0025, 0.0025  # seconds and share of a frame's way to the bridge, or from it


def _ip(*words):
    subprocess.run(["ip"] + [str(word) for word in words], check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Hosts:
    """`count` machines, 10.99.0.1 and so on, while it is entered. What runs on them is ended with them."""

    def __init__(self, count):
        self.tag = "evo{}".format(os.getpid() % 100000)
        self.count = count
        self.links = None
        self.processes = [[] for _ in range(count)]

    def address(self, host):
        return "10.99.0.{}".format(host + 1)

    def __enter__(self):
        try:
            _ip("link", "add", self.tag + "br", "type", "bridge")
            _ip("link", "set", self.tag + "br", "up")
            ends = [end for host in range(self.count) for end in (self._names(host)[1], self._names(host)[1] + "e")]
            self.links = subprocess.Popen(
                [sys.executable, slow_link.__file__, str(DELAY), str(LOSS)] + ends, stdout=subprocess.PIPE)
            assert self.links.stdout.readline() == b"ready\n"
            for host in range(self.count):
                name, link = self._names(host)
                _ip("netns", "add", name)
                _ip("link", "set", link + "e", "netns", name, "name", "eth0")
                _ip("link", "set", link, "mtu", MTU, "master", self.tag + "br")
                _ip("-n", name, "link", "set", "eth0", "mtu", MTU)
                _ip("-n", name, "addr", "add", self.address(host) + "/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", name, "link", "set", device, "up")
                self.join(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for host in range(self.count):
            self.kill(host)
        if self.links is not None:  # its interfaces go with it
            self.links.kill()
            self.links.communicate()
        for host in range(self.count):
            subprocess.run(["ip", "netns", "del", self._names(host)[0]], stderr=subprocess.PIPE)
        subprocess.run(["ip", "link", "del", self.tag + "br"], stderr=subprocess.PIPE)

    def _names(self, host):
        return "{}h{}".format(self.tag, host), "{}v{}".format(self.tag, host)

    def cut(self, host):
        """Unplugs the machine."""
        _ip("link", "set", self._names(host)[1], "down")

    def join(self, host):
        """Plugs it in again."""
        _ip("link", "set", self._names(host)[1], "up")

    def start(self, host, command, cwd, log, env=()):
        """Starts a command on the machine, its output in the file `log`; returns the Popen."""
        with open(str(log), "w") as f:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._names(host)[0]] + [str(word) for word in command], cwd=str(cwd), stdout=f,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env=dict(os.environ, GLOO_SOCKET_IFNAME="eth0", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **dict(env)))
        self.processes[host].append(process)
        return process

    def kill(self, host):
        """The machine loses its power."""
        found = subprocess.run(["ip", "netns", "pids", self._names(host)[0]], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, universal_newlines=True).stdout.split()
        for number in found:
            try:
                os.kill(int(number), signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in self.processes[host]:
            process.wait()
