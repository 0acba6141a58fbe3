"""PTX to C++: one function per kernel, one statement per instruction, registers as local variables.

Only what the Hopper kernel compiles to is known; anything else is an error, so that no instruction is
skipped in silence. Accumulators of a wgmma are passed by address: the machine writes them when the wgmma
completes, which is later than the statement, as on the device. Registers start as a pattern that no result
can be right with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

C_TYPES = {"pred": "bool", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t", "f32": "float"}
UNSIGNED = {"u16": "uint16_t", "u32": "uint32_t", "u64": "uint64_t", "pred": "bool"}
SIGNED = {"16": "int16_t", "32": "int32_t", "64": "int64_t"}
UNORDERED = {"gtu": "le", "geu": "lt", "ltu": "ge", "leu": "gt"}
SPECIAL = {
    "%tid.x": "T.tid",
    "%ctaid.x": "T.cta_index",
    "%cluster_ctarank": "T.cta_rank",
    "%cluster_nctaid.x": "T.cluster_ctas",
    "%cluster_nctaid.y": "1u",
    "%cluster_nctaid.z": "1u",
    "%globaltimer": "nanoseconds(T)",
}
PARAMETER_PITCH = 128  # three tensor maps of 128 bytes, then KernelParams
# No effect that the machine models: memory is sequentially consistent, and registers are not shared out.
IGNORED = ("fence.mbarrier_init", "prefetch", "setmaxnreg", "wgmma.fence", "griddepcontrol.launch_dependents")


def split_operands(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [*parts, part.strip()] if part.strip() else parts


def closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes the block whose text begins at `start`."""
    depth, at = 1, start
    while depth:
        depth += (text[at] == "{") - (text[at] == "}")
        at += 1
    return at - 1


@dataclass
class Block:
    """A brace block of PTX: inline assembly declares registers and labels of its own there."""

    number: int
    registers: set[str]
    labels: set[str]


@dataclass
class Statement:
    text: str
    blocks: list[Block]
    is_label: bool = False


@dataclass
class Kernel:
    name: str
    parameters: list[str]
    types: dict[str, str] = field(default_factory=dict)  # of registers
    used: set[str] = field(default_factory=set)
    local_bytes: int = 0  # of its local memory, which only the arguments of printf lie in

    # ---- names ----
    def register(self, name: str, blocks: list[Block]) -> str:
        for block in reversed(blocks):
            if name in block.registers:
                return f"%B{block.number}_{name.replace('%', '')}"
        return name

    def label(self, name: str, blocks: list[Block]) -> str:
        for block in reversed(blocks):
            if name in block.labels:
                return f"B{block.number}_{name}"
        return name.replace("$", "S")

    # ---- statements ----
    def parse(self, body: str) -> list[Statement]:
        statements: list[Statement] = []
        blocks: list[Block] = []
        at = count = 0
        label = re.compile(r"([$A-Za-z_][\w$]*)\s*:(?!:)")
        while at < len(body):
            if body[at].isspace():
                at += 1
            elif body[at] == "{":
                count += 1
                inner = body[at + 1 : closing_brace(body, at + 1)]
                names = re.findall(r"\.reg\s+\.\w+\s+([^;]+);", inner)
                registers = {name.strip() for group in names for name in group.split(",")}
                labels = set(re.findall(r"(?m)^\s*([A-Za-z_]\w*)\s*:(?!:)", inner))
                blocks.append(Block(count, registers, labels))
                at += 1
            elif body[at] == "}":
                blocks.pop()
                at += 1
            elif found := label.match(body, at):
                statements.append(Statement(self.label(found[1], blocks), [], is_label=True))
                at = found.end()
            else:
                end = body.index(";", at)
                text = " ".join(body[at:end].split())
                at = end + 1
                if text.startswith(".reg"):
                    self.declare(text, blocks)
                elif found := re.match(r"\.local .* __local_depot\d+\[(\d+)\]$", text):
                    self.local_bytes = int(found[1])
                elif text.startswith(".param"):
                    pass  # of a call: run_call names them
                elif text and not text.startswith(".pragma"):
                    statements.append(Statement(text, list(blocks)))
        return statements

    def declare(self, text: str, blocks: list[Block]) -> None:
        _, kind, names = text.split(" ", 2)
        for name in names.split(","):
            if numbered := re.match(r"(%\w+)<(\d+)>", name.strip()):
                for i in range(int(numbered[2])):
                    self.types[f"{numbered[1]}{i}"] = kind[1:]
            else:
                self.types[self.register(name.strip(), blocks)] = kind[1:]

    def translate(self, body: str) -> str:
        lines = []
        for statement in self.parse(body):
            if statement.is_label:
                lines.append(f"{statement.text}: ;")
                continue
            try:
                lines.append(Instruction(self, statement).guarded())
            except (KeyError, IndexError, AssertionError, NotImplementedError) as error:
                raise NotImplementedError(f"PTX not understood: {statement.text} ({error!r})") from error
        names = sorted(self.used)
        declared = [f"{C_TYPES[self.types[n]]} {variable(n)}{{{initial(self.types[n])}}};" for n in names]
        if self.local_bytes:
            declared.append(
                f"alignas(8) uint8_t local_depot[{self.local_bytes}]; uint64_t param0 = 0, param1 = 0;"
            )
        return "\n".join([f"void {self.name}(Thread& T) {{", *declared, *lines, "}"]) + "\n"


def variable(register: str) -> str:
    return "v_" + register.replace("%", "")


def initial(kind: str) -> str:
    return {"pred": "true", "f32": "float(kPoison)", "b16": "uint16_t(kPoison)"}.get(kind, "kPoison")


class Instruction:
    """One instruction; :meth:`guarded` gives its C++."""

    def __init__(self, kernel: Kernel, statement: Statement, text: str | None = None) -> None:
        self.kernel, self.blocks, self.statement = kernel, statement.blocks, statement
        self.text = text or statement.text
        self.op, _, rest = self.text.partition(" ")
        self.operands = split_operands(rest)
        self.parts = self.op.split(".")
        self.type = self.parts[-1]
        digits = re.fullmatch(r"[busf](\d+)", self.type)
        self.bits = digits[1] if digits else ""
        self.unsigned = f"u{self.bits}"

    def guarded(self) -> str:
        if found := re.match(r"^@(!?)(\S+)\s+(.*)$", self.text):
            guard = found[1] + self.value(found[2], "pred")
            return f"if ({guard}) {{ {Instruction(self.kernel, self.statement, found[3]).guarded()} }}"
        if self.op.startswith(IGNORED):
            return ";"
        for translate in (self.control, self.synchronise, self.copy, self.matrix, self.move, self.arithmetic):
            if (code := translate()) is not None:
                return code
        raise NotImplementedError(self.op)

    # ---- operands ----
    def value(self, text: str, kind: str) -> str:
        """C++ expression of an operand, as u16, u32, u64, f32 or pred."""
        name = self.kernel.register(text.strip(), self.blocks)
        if name in self.kernel.types:
            self.kernel.used.add(name)
            is_float = self.kernel.types[name] == "f32"
            if kind == "f32":
                return variable(name) if is_float else f"as_float({variable(name)})"
            if kind == "pred":
                return variable(name)
            return f"as_bits({variable(name)})" if is_float else f"{UNSIGNED[kind]}({variable(name)})"
        if name in SPECIAL:
            return SPECIAL[name]
        if name.endswith("3rawE"):  # the kernel's extern __shared__ array
            return "shared_base"
        if name.startswith("__local_depot"):
            return "uint64_t(local_depot)"
        if name.startswith("$str"):
            return f"uint64_t({string(name)})"
        if name in self.kernel.parameters:
            return f"(parameters + {PARAMETER_PITCH * self.kernel.parameters.index(name)})"
        if found := re.fullmatch(r"0f([0-9A-Fa-f]{8})", name):
            return f"as_float(0x{found[1]}u)" if kind == "f32" else f"0x{found[1]}u"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", name):
            return f"{UNSIGNED[kind]}(0x{int(name.rstrip('U'), 0) & (1 << 64) - 1:x}ull)"
        raise KeyError(name)

    def read(self, index: int, kind: str) -> str:
        return self.value(self.operands[index], kind)

    def typed(self, index: int) -> str:
        """An operand with the signedness of the instruction."""
        if self.type == "f32":
            return self.read(index, "f32")
        value = self.read(index, self.unsigned)
        return f"{SIGNED[self.bits]}({value})" if self.type[0] == "s" else value

    def assign(self, name: str, expression: str, kind: str) -> str:
        name = self.kernel.register(name.strip(), self.blocks)
        if name == "_":
            return ""
        self.kernel.used.add(name)
        is_float = self.kernel.types[name] == "f32"
        if is_float and kind != "f32":
            expression = f"as_float(uint32_t({expression}))"
        elif kind == "f32" and not is_float:
            expression = f"as_bits({expression})"
        return f"{variable(name)} = {expression};"

    def result(self, expression: str, kind: str) -> str:
        return self.assign(self.operands[0], expression, kind)

    def address(self, index: int, kind: str) -> str:
        text = self.operands[index].strip()
        assert text[0] == "[", text
        text = text[1:-1].strip()
        if found := re.match(r"^(\S+?)\s*\+\s*(-?\d+)$", text):
            return f"({self.value(found[1], kind)} + ({found[2]}))"
        return self.value(text, kind)

    # ---- instructions by group; None: not one of them ----
    def control(self) -> str | None:
        if self.parts[0] == "bra":
            return f"goto {self.kernel.label(self.operands[0], self.blocks)};"
        if self.parts[0] == "call":
            assert self.operands[1:] == ["vprintf", "( param0, param1 )"], self.operands
            return "print(T, param0, param1);"
        return {"ret": "return;", "trap": "trap(T);"}.get(self.parts[0])

    def synchronise(self) -> str | None:
        op = self.op
        if op == "bar.sync":
            count = self.read(1, "u32") if len(self.operands) > 1 else "T.block_threads"
            return f"sync_threads(T, {self.read(0, 'u32')}, {count});"
        if op == "bar.warp.sync":
            return f"sync_warp(T, {self.read(0, 'u32')});"
        if op.startswith("shfl.sync"):
            arguments = ", ".join(self.read(i, "u32") for i in range(1, 5))
            shuffle = f"shuffle(T, Shuffle::{self.parts[2]}, {arguments})"
            return self.assign(self.operands[0].split("|")[0], shuffle, "u32")
        if op.startswith("elect.sync"):
            lane, elected = self.operands[0].split("|")
            return self.assign(elected, "T.lane == 0", "pred") + self.assign(lane, "0u", "u32")
        if op.startswith("barrier.cluster.arrive"):
            return "arrive_cluster(T);"
        if op.startswith("barrier.cluster.wait"):
            return "wait_cluster(T);"
        if op == "griddepcontrol.wait":
            return "wait_prior_grid(T);"
        if op.startswith("mbarrier.init"):
            return f"init_mbarrier(T, {self.address(0, 'u32')}, {self.read(1, 'u32')});"
        if op.startswith("mbarrier.arrive.expect_tx"):
            return f"arrive_mbarrier(T, {self.address(1, 'u32')}, {self.read(2, 'u32')});"
        if op.startswith("mbarrier.arrive"):
            return f"arrive_mbarrier(T, {self.address(1, 'u32')}, 0);"
        if op.startswith("mbarrier.try_wait.parity"):
            return self.result(f"wait_mbarrier(T, {self.address(1, 'u32')}, {self.read(2, 'u32')})", "pred")
        if op.startswith("mapa"):
            return self.result(f"map_to_cta(T, {self.read(1, 'u32')}, {self.read(2, 'u32')})", "u32")
        return None

    def copy(self) -> str | None:
        if self.op.startswith("atom.global.max.s32"):
            return self.result(f"atomic_max(T, {self.address(1, 'u64')}, int({self.read(2, 'u32')}))", "u32")
        if self.op.startswith("cp.async.bulk.tensor.2d"):
            tensor_map, coordinates = split_operands(self.operands[1][1:-1])
            x, y = (self.value(c, "u32") for c in split_operands(coordinates.strip("{}")))
            multicast = "multicast" in self.op
            assert len(self.operands) == (5 if multicast else 4)
            mask = self.read(3, "u16") if multicast else "kOwnCta"
            where = f"{self.address(0, 'u32')}, {self.value(tensor_map, 'u64')}, {x}, {y}"
            return f"copy_tensor(T, {where}, {self.address(2, 'u32')}, {mask});"
        if self.op.startswith("cp.async.bulk.shared"):
            where = f"{self.address(0, 'u32')}, {self.address(1, 'u64')}, {self.read(2, 'u32')}"
            return f"copy_bulk(T, {where}, {self.address(3, 'u32')});"
        return None

    def matrix(self) -> str | None:
        if self.op.startswith("mma.sync.aligned.m16n8k16.row.col.f32"):
            return self.multiply_in_warp()
        if self.op.startswith("wgmma.commit"):
            return "commit_wgmma(T);"
        if self.op.startswith("wgmma.wait"):
            return f"wait_wgmma(T, {self.operands[0]});"
        if not self.op.startswith("wgmma.mma_async"):
            return None
        assert "f32.e4m3.e4m3" in self.op
        sparse = ".sp." in self.op
        columns = int(re.search(r"m64n(\d+)k", self.op)[1])
        accumulators = split_operands(self.operands[0].strip("{}"))
        assert len(accumulators) == columns // 2
        for name in accumulators:
            assert self.kernel.types[name] == "f32"
            self.kernel.used.add(name)
        if sparse:  # metadata, its selector, scale-d, then the signs of a and b
            assert self.operands[4] == "0"
            metadata, scale, signs = self.read(3, "u32"), self.read(5, "pred"), self.operands[6:]
        else:
            metadata, scale, signs = "0u", self.read(3, "pred"), self.operands[4:]
        assert signs == ["1", "1"]
        pointers = ", ".join("&" + variable(name) for name in accumulators)
        shape = f"{columns}, {str(sparse).lower()}"
        values = f"{self.read(1, 'u64')}, {self.read(2, 'u64')}, {metadata}, {scale}"
        return f"{{ float* d[] = {{{pointers}}}; start_wgmma(T, {shape}, d, {values}); }}"

    def multiply_in_warp(self) -> str:
        """``mma.sync d, a, b, c`` with sums in fp32."""
        bf16 = str("bf16" in self.parts).lower()
        to, left, right, sums = (split_operands(text.strip("{}")) for text in self.operands)
        values = [", ".join(self.value(name, "u32") for name in names) for names in (left, right)]
        start = ", ".join(self.value(name, "f32") for name in sums)
        arrays = f"float d[4] = {{{start}}}; uint32_t const a[4] = {{{values[0]}}}, b[2] = {{{values[1]}}};"
        results = " ".join(self.assign(name, f"d[{i}]", "f32") for i, name in enumerate(to))
        return f"{{ {arrays} multiply_in_warp(T, {bf16}, d, a, b); {results} }}"

    def move(self) -> str | None:
        base = self.parts[0]
        if base == "mov":
            if self.type in ("pred", "f32"):
                return self.result(self.read(1, self.type), self.type)
            if self.operands[1][0] == "{":
                packed = split_operands(self.operands[1].strip("{}"))
                width = int(self.bits) // len(packed)
                words = (f"{UNSIGNED[self.unsigned]}({self.value(p, f'u{width}')})" for p in packed)
                return self.result(
                    " | ".join(f"({w} << {i * width})" for i, w in enumerate(words)), self.unsigned
                )
            return self.result(self.read(1, self.unsigned), self.unsigned)
        if base in ("ld", "st"):
            return self.load_or_store(base == "st")
        if base == "cvta":
            return self.result(self.read(1, "u64"), "u64")
        return self.convert() if base == "cvt" else None

    def load_or_store(self, store: bool) -> str:
        width = int(self.bits) // 8
        registers = split_operands(self.operands[1 if store else 0].strip("{}"))
        kind = "f32" if self.type == "f32" else self.unsigned
        c_type = "float" if kind == "f32" else UNSIGNED.get(kind, "uint8_t")
        if kind == "u8":  # registers are wider
            assert self.type == "u8", self.type
            kind = "u32"
        where = 0 if store else 1
        if found := re.match(r"\[(param[01]|retval0)\+0\]$", self.operands[where]):
            return f"{found[1]} = {self.value(registers[0], 'u64')};" if store else self.result("0u", "u32")
        if self.parts[1] == "local":
            pointer = f"(uint8_t*)({self.address(where, 'u64')})"
        elif self.parts[1] == "param":
            pointer = f"(uint8_t*)({self.address(where, 'u64')})"
            c_type = SIGNED[self.bits] if self.type[0] == "s" else c_type
        else:
            access, kind_of_address = {
                "global": ("at_global", "u64"),
                "shared": ("at_shared", "u32"),
                "shared::cluster": ("at_cluster", "u32"),
            }[self.parts[1]]
            what = self.text.replace('"', "'")[:70]
            address = self.address(where, kind_of_address)
            size = width * len(registers)
            pointer = f'{access}(T, {address}, {size}, {str(store).lower()}, "{what}")'
        code = []
        for i, name in enumerate(registers):
            if store:
                code.append(f"store(p + {i * width}, {self.value(name, kind)});")
            else:
                code.append(self.assign(name, f"load<{c_type}>(p + {i * width})", kind))
        return f"{{ uint8_t* p = {pointer}; {' '.join(code)} }}"

    def convert(self) -> str:
        if self.parts[2] in ("bf16x2", "f16x2"):  # the first operand in the high half
            assert self.parts[1::2] == ["rn", "f32"]
            high, low = (f"uint32_t(to_{self.parts[2][:-2]}({self.read(i, 'f32')}))" for i in (1, 2))
            return self.result(f"{high} << 16 | {low}", "u32")
        to, of = (part for part in self.parts if re.fullmatch(r"bf16|[busf]\d+", part))
        if to == "f32":
            return self.result(f"from_{of}({self.read(1, 'u16')})", "f32")
        if of == "f32":
            assert "rn" in self.parts
            return self.result(f"to_{to}({self.read(1, 'f32')})", "u16")
        value = self.read(1, f"u{of[1:]}")
        if of[0] == "s":
            value = f"int64_t({SIGNED[of[1:]]}({value}))"
        return self.result(f"{UNSIGNED[f'u{to[1:]}']}({value})", f"u{to[1:]}")

    def arithmetic(self) -> str | None:
        base, kind = self.parts[0], self.type if self.type in ("f32", "pred") else self.unsigned
        if base == "setp":
            signs = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
            if self.type == "f32" and self.parts[1] in UNORDERED:  # true where one is NaN, too
                sign = signs[UNORDERED[self.parts[1]]]
                return self.result(f"!({self.typed(1)} {sign} {self.typed(2)})", "pred")
            return self.result(f"{self.typed(1)} {signs[self.parts[1]]} {self.typed(2)}", "pred")
        if base == "selp":
            return self.result(f"{self.read(3, 'pred')} ? {self.read(1, kind)} : {self.read(2, kind)}", kind)
        if base in ("and", "or", "xor"):
            sign = {"and": "&", "or": "|", "xor": "^"}[base]
            return self.result(f"{self.read(1, kind)} {sign} {self.read(2, kind)}", kind)
        if base == "not" and kind != "pred":
            return self.result(f"~{self.read(1, kind)}", kind)
        if base in ("add", "sub"):
            return self.result(
                f"{self.read(1, kind)} {'+' if base == 'add' else '-'} {self.read(2, kind)}", kind
            )
        if base == "shl":
            return self.result(f"shift_left({self.read(1, kind)}, {self.read(2, 'u32')})", kind)
        if base == "shr":
            return self.result(f"shift_right({self.typed(1)}, {self.read(2, 'u32')})", kind)
        if base == "prmt":
            assert self.op == "prmt.b32", "a mode"
            return self.result(f"permute({', '.join(self.read(i, 'u32') for i in range(1, 4))})", "u32")
        if base == "bfi":
            return self.result(f"insert_bits({', '.join(self.read(i, 'u32') for i in range(1, 5))})", "u32")
        return self.float_arithmetic() if kind == "f32" else self.integer_arithmetic(kind)

    def float_arithmetic(self) -> str | None:
        base = self.parts[0]
        values = [self.read(i, "f32") for i in range(1, len(self.operands))]
        simple = {"mul": " * ", "div": " / "}
        functions = {"abs": "fabsf", "fma": "fmaf", "ex2": "exp2f", "max": "fmaxf", "min": "fminf"}
        if base in simple:
            return self.result(simple[base].join(values), "f32")
        return self.result(f"{functions[base]}({', '.join(values)})", "f32")

    def integer_arithmetic(self, kind: str) -> str | None:
        base = self.parts[0]
        if base == "neg":
            return self.result(f"0 - {self.read(1, kind)}", kind)
        if base in ("max", "min"):
            return self.result(f"std::{base}({self.typed(1)}, {self.typed(2)})", kind)
        if base in ("div", "rem"):
            return self.result(f"{self.typed(1)} {'/' if base == 'div' else '%'} {self.typed(2)}", kind)
        if self.op.startswith("mul.lo"):
            return self.result(f"{self.read(1, kind)} * {self.read(2, kind)}", kind)
        if self.op.startswith("mad.lo"):
            return self.result(f"{self.read(1, kind)} * {self.read(2, kind)} + {self.read(3, kind)}", kind)
        if self.op == "mul.wide.s32":
            return self.result(f"uint64_t(int64_t({self.typed(1)}) * int64_t({self.typed(2)}))", "u64")
        if self.op in ("mul.wide.u16", "mul.wide.u32"):
            wide = f"u{2 * int(self.bits)}"
            return self.result(f"{UNSIGNED[wide]}({self.read(1, kind)}) * {self.read(2, kind)}", wide)
        if self.op == "mul.hi.s32":
            product = f"int64_t({self.typed(1)}) * int64_t({self.typed(2)})"
            return self.result(f"uint32_t(({product}) >> 32)", "u32")
        return None


def kernel_name(
    warpgroups: int, tokens: int, multicast: bool, promote: int, paired: bool, packed: bool = False
) -> str:
    """C++ name of the kernel with these template arguments."""
    return f"kernel_{warpgroups}_{tokens}_{int(multicast)}_{promote}_{int(paired)}_{int(packed)}"


def string(name: str) -> str:
    """C++ name of a string that printf is given."""
    return name.replace("$", "s_")


def strings(ptx: str) -> str:
    """C++ of the strings of a PTX module."""
    found = re.findall(r"\.global \.align 1 \.b8 (\$str\S*?)\[\d+\] = \{([^}]*)\};", ptx)
    return "".join(f"static char const {string(name)}[] = {{{values}}};\n" for name, values in found)


def translate(ptx: str) -> dict[str, str]:
    """C++ of every kernel of a PTX module by name: :func:`kernel_name`, or as it is mangled."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    kernels = {}
    for found in re.finditer(r"\.visible \.entry (\w+)\((.*?)\)\s*(?:\.\w+[^\n{]*\n)*\s*\{", ptx, re.S):
        parameters = re.findall(r"(\w+_param_\d)\[", found[2])
        name = found[1]
        if "linear_kernelINS0_5Shape" in name:
            assert len(parameters) == 4, "three tensor maps and KernelParams"
            groups, tokens, multicast, promote, *kind = map(int, re.findall(r"L[ib](\d+)E", name))
            name = kernel_name(groups, tokens, bool(multicast), promote, *map(bool, kind))
        else:
            assert len(parameters) == 1, "whatever fits one struct"
        body = ptx[found.end() : closing_brace(ptx, found.end())]
        kernels[name] = Kernel(name, parameters).translate(body)
    return kernels
