"""A link between two network interfaces that delays frames and loses some. Few kernels of containers bring the queue
that does this (netem); this one is a program, which needs /dev/net/tun.

python slow_link.py DELAY LOSS NEAR FAR [NEAR FAR ...]   (seconds, one way; the share that is lost; interfaces to make)
"""
import collections
import fcntl
import os
import random
import select
import struct
import sys
import time

TUN = "/dev/net/tun"
FRAME = 65536
SET_INTERFACE, TAP, WITHOUT_HEADER = 0x400454ca, 0x0002, 0x1000  # linux/if_tun.h


def open_interface(name):
    """File descriptor of a new interface: what is written to it arrives there, what is sent there is read from it."""
    interface = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(interface, SET_INTERFACE, struct.pack("16sH22x", name.encode(), TAP | WITHOUT_HEADER))
    return interface


def forward(ends, delay, loss):
    """Carries frames from each interface to its other end, {interface: other}, in their order; never returns."""
    chance = random.Random(0)
    on_the_way = collections.deque()  # of (time of arrival, interface, frame)
    while True:
        wait = max(on_the_way[0][0] - time.monotonic(), 0) if on_the_way else None
        for interface in select.select(list(ends), [], [], wait)[0]:
            frame = os.read(interface, FRAME)
            if chance.random() >= loss:
                on_the_way.append((time.monotonic() + delay, ends[interface], frame))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, interface, frame = on_the_way.popleft()
            try:
                os.write(interface, frame)
            except OSError:  # it is down, or its queue is full: a lost frame
                pass


def main(delay, loss, *names):
    interfaces = [open_interface(name) for name in names]
    print("ready", flush=True)
    ends = {}
    for near, far in zip(interfaces[::2], interfaces[1::2]):
        ends.update({near: far, far: near})
    forward(ends, float(delay), float(loss))


if __name__ == "__main__":
    main(*sys.argv[1:])
