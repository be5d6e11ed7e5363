"""Processes that import nothing: one that has imported everything forks them, so that each takes milliseconds to start, not seconds.

`run` and `Popen` are those of `subprocess`, for commands that begin with this interpreter or with a script of it. Such a process has its
own arguments, environment, folder, streams, signals and exit status, as any other. With `fresh` it has imported what others wrote, and
nothing of `replaceme`. Where its environment holds other variables that are read while something is imported it is an ordinary process; and
who tests imports themselves uses `subprocess`.
"""
import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import types

READ_BY_IMPORTS = ("PYTHON", "HF_", "TRANSFORMERS", "TORCH", "OMP_", "MKL_", "CUDA", "MPL", "TOKENIZERS")
SERVERS = {}  # the sockets of the processes that fork: of the fresh one, and of that which has imported everything


def server(fresh):
    if fresh not in SERVERS:
        SERVERS[fresh], theirs = socket.socketpair()
        subprocess.Popen([sys.executable, __file__, str(theirs.fileno()), *["fresh"] * fresh], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
    return SERVERS[fresh]


def ours(args):
    "What follows the interpreter, or None"
    args = [os.fspath(a) for a in args]
    if args[0] == sys.executable:
        return args[1:] if args[1] == "-c" or not args[1].startswith("-") else None
    with open(args[0], "rb") as f:
        return args if f.readline().strip() == b"#!" + sys.executable.encode() else None


def imports_alike(env):
    def those(e):
        return {k: v for k, v in e.items() if k.startswith(READ_BY_IMPORTS)}
    return env is None or those(env) == those(os.environ)


class Popen(subprocess.Popen):
    warm = False

    def __init__(self, *args, fresh=False, **more):
        self.fresh = fresh
        super().__init__(*args, **more)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *more):
        words = None if shell or preexec_fn or pass_fds or isinstance(args, (str, bytes)) else ours(args)
        if words is None or not imports_alike(env):
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *more)
        fds, self.warm = more[:6], True
        self.talk, theirs = socket.socketpair()
        socket.send_fds(server(self.fresh), [b"x"], [i if fd == -1 else fd for i, fd in enumerate((fds[0], fds[3], fds[5]))] + [theirs.fileno()])
        theirs.close()
        asked = dict(args=words, cwd=os.fspath(cwd or os.getcwd()), env=dict(os.environ if env is None else env))
        self.talk.sendall(json.dumps(asked).encode() + b"\n")
        self.said = self.talk.makefile("rb", buffering=0)
        self.pid = int(self.said.readline())
        self._child_created = True
        self._close_pipe_fds(*fds)

    def _try_wait(self, flags):
        if not self.warm:
            return super()._try_wait(flags)
        if flags & os.WNOHANG and not select.select([self.talk], [], [], 0)[0]:
            return 0, 0
        status = int(self.said.readline() or 255 << 8)
        self.said.close()
        self.talk.close()
        return self.pid, status

    def _internal_poll(self, *known, **more):
        if not self.warm:
            return super()._internal_poll(*known, **more)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid == self.pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(args, input=None, capture_output=False, timeout=None, check=False, **more):
    if capture_output:
        more |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if input is not None:
        more["stdin"] = subprocess.PIPE
    with Popen(args, **more) as p:
        try:
            out, err = p.communicate(input, timeout)
        except BaseException:
            p.kill()
            raise
    done = subprocess.CompletedProcess(args, p.returncode, out, err)
    if check:
        done.check_returncode()
    return done


# --- the process that forks

def ended(run):
    "The exit status, as the interpreter has it"
    try:
        run()
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def become(asked, fds):
    "The process that was asked for"
    import tempfile
    for i, (name, fd) in enumerate(zip(("stdin", "stdout", "stderr"), fds)):
        os.dup2(fd, i)
        os.close(fd)
        old = getattr(sys, name)
        setattr(sys, name, open(i, old.mode, 1 if i == 2 else -1, encoding=old.encoding, errors=old.errors, closefd=False))
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    tempfile.tempdir = None
    name, *words = asked["args"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if name == "-c":
        sys.path[0], sys.argv, source, name = "", ["-c", *words[1:]], words[0], "<string>"
    else:
        sys.path[0], sys.argv, main.__file__ = os.path.dirname(name), [name, *words], os.path.abspath(name)
        with open(name, encoding="utf-8") as f:
            source = f.read()
    status = ended(lambda: exec(compile(source, name, "exec"), main.__dict__))
    ended(atexit._run_exitfuncs)
    for f in (sys.stdout, sys.stderr):
        ended(f.flush)
    os._exit(status & 255)


def keep(fds):
    "Start one process, and tell its number and how it ends"
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    talk = socket.socket(fileno=fds.pop())
    asked = json.loads(talk.makefile("rb").readline())
    if (pid := os.fork()) == 0:
        talk.close()
        become(asked, fds)
    for fd in fds:
        os.close(fd)
    try:
        talk.sendall(b"%d\n" % pid)
        talk.sendall(b"%d\n" % os.waitpid(pid, 0)[1])
    except OSError:
        pass  # nobody listens any more
    os._exit(0)


def serve(sock, fresh):
    import gc

    import datasets  # noqa: F401
    import lm_eval.tasks  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import transformers.trainer  # noqa: F401

    if not fresh:
        import replaceme.cli  # noqa: F401
        import replaceme.contract  # noqa: F401
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, fds, *_ = socket.recv_fds(sock, 1, 4)
        if not asked:
            return
        if os.fork() == 0:
            sock.close()
            keep(fds)
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), "fresh" in sys.argv)
