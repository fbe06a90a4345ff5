"""Two processes, one WriteImm: a child writes into this process, which counts the arrival."""

import multiprocessing

import fabric


def writer(descriptor: bytes, counter: int) -> None:
    """Write five bytes and count them as one."""
    with fabric.TransferEngine() as engine:
        source = engine.alloc(4096)
        source.numpy()[:5] = list(b"hello")
        target = fabric.Descriptor.from_bytes(descriptor)
        engine.write(source, target, length=5, imm=counter).wait(timeout=10)


if __name__ == "__main__":
    with fabric.TransferEngine() as engine:
        memory, counter = engine.alloc(4096), engine.counter()
        arguments = (bytes(memory.descriptor), counter.id)
        child = multiprocessing.get_context("spawn").Process(target=writer, args=arguments)
        child.start()
        counter.wait(1, timeout=10)
        print(memory.numpy()[:5].tobytes().decode(), "from process", child.pid)
        child.join()
