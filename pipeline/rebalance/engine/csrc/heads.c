/* The kernel for every instruction set, and the Python module `_c_kernel` around it. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Rows of one order, in steps of `batch`. The same fields as BLOCK in c_backend.py. */
struct block {
    const void *features;     /* (rows, D) REAL */
    const void *inverse_norm; /* (rows,) REAL: 1/|x| */
    const int32_t *labels;    /* (rows,) */
    int64_t rows, batch, width, classes, padded;
    double lr, momentum, weight_decay;
};

/* Threads that share a head: each has a run of its classes and a run of every batch's samples. */
struct meeting {
    atomic_int arrived, round;
};
struct team {
    long rank, members;
    struct meeting *meeting;
};

/* Return when all members have called it; each then sees what the others wrote before. */
static void wait_for_team(const struct team *team) {
    if (team->members == 1) return;
    struct meeting *m = team->meeting;
    int round = atomic_load(&m->round);
    if (atomic_fetch_add(&m->arrived, 1) == team->members - 1) {
        atomic_store(&m->arrived, 0);
        atomic_fetch_add(&m->round, 1);
        return;
    }
    for (long spins = 0; atomic_load(&m->round) == round; spins++)
        if (spins > 2000) sched_yield();
}

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")


#define REAL double
#define INT int64_t
#define SINGLE 0
#define REAL_EXP exp
#define REAL_LOG log
#define REAL_SQRT sqrt
#define NAME(x) x##_double
#define BYTES 16
#define ROWS 4
#define COLS 4
#include "kernel.h"
#undef REAL
#undef INT
#undef SINGLE
#undef REAL_EXP
#undef REAL_LOG
#undef REAL_SQRT

#define REAL float
#define INT int32_t
#define SINGLE 1
#define REAL_EXP expf
#define REAL_LOG logf
#define REAL_SQRT sqrtf

#define NAME(x) x##_plain
#define BYTES 16
#define ROWS 4
#define COLS 4
#include "kernel.h"

#if defined(__x86_64__) && !defined(__clang__)
#define X86 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(x) x##_avx2
#define BYTES 32
#define ROWS 6
#define COLS 2
#include "kernel.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#define NAME(x) x##_avx512
#define BYTES 64
#define ROWS 8
#define COLS 3
#include "kernel.h"
#pragma GCC pop_options
#endif

struct set {
    const char *name;
    int lanes;
    void (*advance)(const struct head *, const struct block *, const struct team *, void *);
};

/* Instruction sets of this processor, the fastest first; double precision, for exactness alone, last. */
static int supported(struct set *sets) {
    int n = 0;
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets[n++] = (struct set){"avx512", 16, advance_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets[n++] = (struct set){"avx2", 8, advance_avx2};
#endif
    sets[n++] = (struct set){"plain", 4, advance_plain};
    sets[n++] = (struct set){"double", 2, advance_double};
    return n;
}

static PyObject *instruction_sets(PyObject *self, PyObject *none) {
    struct set sets[4];
    PyObject *list = PyList_New(0);
    for (int i = 0, n = supported(sets); list && i < n; i++) {
        PyObject *item = Py_BuildValue("(si)", sets[i].name, sets[i].lanes);
        if (!item || PyList_Append(list, item)) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *sizes(PyObject *self, PyObject *none) {
    return Py_BuildValue("(nn)", (Py_ssize_t)sizeof(struct head), (Py_ssize_t)sizeof(struct block));
}

/* advance(instruction set, address of heads, first, last + 1, of a block, of scratch, of a meeting, rank, members)

Blocks until all heads are through; the other members of a team have to call too. No checks: c_backend.py makes them. */
static PyObject *advance(PyObject *self, PyObject *args) {
    struct set sets[4];
    unsigned long long heads, block, scratch, meeting;
    Py_ssize_t first, last, rank, members;
    int set;
    if (!PyArg_ParseTuple(args, "iKnnKKKnn", &set, &heads, &first, &last, &block, &scratch, &meeting, &rank, &members))
        return NULL;
    if (set < 0 || set >= supported(sets)) {
        PyErr_SetString(PyExc_ValueError, "no such instruction set on this processor");
        return NULL;
    }
    struct team team = {rank, members, (struct meeting *)(uintptr_t)meeting};
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = first; i < last; i++)
        sets[set].advance((struct head *)(uintptr_t)heads + i, (struct block *)(uintptr_t)block, &team,
                          (void *)(uintptr_t)scratch);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* scratch_size(batch, padded classes, members): numbers that a team needs */
static PyObject *scratch_size(PyObject *self, PyObject *args) {
    Py_ssize_t batch, padded, members;
    if (!PyArg_ParseTuple(args, "nnn", &batch, &padded, &members)) return NULL;
    return PyLong_FromSsize_t((1 + batch + members * ARRAYS_plain) * padded);
}

static PyMethodDef methods[] = {
    {"advance", advance, METH_VARARGS, "Every batch of a block for some heads, in place."},
    {"scratch_size", scratch_size, METH_VARARGS, "Numbers of scratch that a team needs."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "(name, lanes) of each that this processor runs, fastest first."},
    {"sizes", sizes, METH_NOARGS, "Bytes of a head and of a block."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_c_kernel", "Stage 2 on a CPU.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__c_kernel(void) { return PyModule_Create(&module); }
