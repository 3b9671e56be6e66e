// The instructions of Hopper that CUDA C++ has no function for: barriers, the copy
// engine, and wgmma. Names and operands are those of the PTX ISA.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace jmx8::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void BarrierInit(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void BarrierArriveExpect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}

// Arrives when all of the thread's earlier CopyAsync are done.
__device__ __forceinline__ void BarrierArriveAfterCopies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier)
               : "memory");
}

__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Of the threads that share a named barrier, not of the whole block.
__device__ __forceinline__ void NamedBarrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Waits until the kernel before has ended, and what it wrote is there, if this one was
// launched to start earlier.
__device__ __forceinline__ void WaitForKernelBefore() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next kernel start, if it is launched to start early, once all blocks of this
// one have come here or ended.
__device__ __forceinline__ void LetNextKernelStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Between ordinary accesses to shared memory and those of the copy engine and wgmma.
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void LoadTile2(uint32_t to, const CUtensorMap* map,
                                          uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

// As LoadTile2, with a cache policy.
__device__ __forceinline__ void LoadTile3(uint32_t to, const CUtensorMap* map,
                                          uint32_t barrier, int c0, int c1, int c2,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
      : "memory");
}

// A tile from shared to global memory, but for what is outside of the tensor.
__device__ __forceinline__ void StoreTile2(const CUtensorMap* map, int c0, int c1,
                                           uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
          map),
      "r"(c0), "r"(c1), "r"(from)
      : "memory");
}

__device__ __forceinline__ void StoreTileCommit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until the thread's StoreTile2 have read shared memory, but for the last groups'.
template <int kPending>
__device__ __forceinline__ void StoreTileWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void StoreTileWaitAll() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ uint64_t EvictFirstPolicy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint64_t EvictNormalPolicy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void CopyAsync4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from)
               : "memory");
}

// Copies 4 bytes, of which those past `bytes` become zeros.
__device__ __forceinline__ void CopyAsync4(uint32_t to, const void* from,
                                           uint32_t bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}

// Copies 16 bytes, of which those past `bytes` become zeros.
__device__ __forceinline__ void CopyAsync16(uint32_t to, const void* from,
                                            uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}

// The same, with a cache policy.
__device__ __forceinline__ void CopyAsync16(uint32_t to, const void* from,
                                            uint32_t bytes, uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
      "l"(from), "r"(bytes), "l"(policy)
      : "memory");
}

// As CopyAsync16, through the first cache: other blocks of the multiprocessor may read
// it, too.
__device__ __forceinline__ void CopyAsync16Cached(uint32_t to, const void* from,
                                                  uint32_t bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void CopyAsyncWaitAll() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ uint32_t LoadShared8(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

__device__ __forceinline__ uint32_t LoadShared16(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

__device__ __forceinline__ uint32_t LoadShared32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

__device__ __forceinline__ void StoreShared32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint4 LoadShared128(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

// `low` in the lower half.
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Of 8 x 8 matrices of 16 bits the columns, to where each lane points with one.
__device__ __forceinline__ void StoreTransposed(uint32_t to, const uint32_t (&v)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
      ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
      : "memory");
}

__device__ __forceinline__ void StoreTransposed(uint32_t to, const uint32_t (&v)[2]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to),
      "r"(v[0]), "r"(v[1])
      : "memory");
}

__device__ __forceinline__ void StoreTransposed(uint32_t to, const uint32_t (&v)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to),
               "r"(v[0])
               : "memory");
}

// Of another block of the cluster: its address of what is at `address` here.
__device__ __forceinline__ uint32_t MapShared(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// In these two `to` and `barrier` are another block's. Arriving puts nothing in order.
__device__ __forceinline__ void BarrierArriveThere(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}

__device__ __forceinline__ void CopyThere(uint32_t to, uint32_t from, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Of all threads of the cluster. Accesses to memory are not put in order: that takes a
// fence of the whole GPU.
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Of a K-major operand whose rows are 128 bytes, swizzled by 128 bytes; groups of eight
// rows are 1024 bytes apart.
__device__ __forceinline__ uint64_t SwizzledDescriptor(uint32_t address) {
  return (uint64_t{1} << 62) | (uint64_t{64} << 32) | (uint64_t{1} << 16) |
         ((address & 0x3FFFF) >> 4);
}

// d[64, kColumns] += a[64, 16] @ b[kColumns, 16].T, a in registers, b in shared memory.
template <int kColumns>
__device__ void Wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b);

// The operands' numbers, and their registers.
#define JMX8_N4 "%0,%1,%2,%3"
#define JMX8_N8 JMX8_N4 ",%4,%5,%6,%7"
#define JMX8_N16 JMX8_N8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define JMX8_N32                                                                   \
  JMX8_N16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define JMX8_N64                                                                   \
  JMX8_N32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48," \
           "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define JMX8_N48                                                                   \
  JMX8_N32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define JMX8_N128                                                                  \
  JMX8_N64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80," \
           "%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,"  \
           "%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"  \
           "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,"     \
           "%125,%126,%127"
#define JMX8_R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JMX8_R8(i) JMX8_R4(i), JMX8_R4(i + 4)
#define JMX8_R16(i) JMX8_R8(i), JMX8_R8(i + 8)
#define JMX8_R32(i) JMX8_R16(i), JMX8_R16(i + 16)
#define JMX8_R48(i) JMX8_R32(i), JMX8_R16(i + 32)
#define JMX8_R64(i) JMX8_R32(i), JMX8_R32(i + 32)
#define JMX8_R128(i) JMX8_R64(i), JMX8_R64(i + 64)
#define JMX8_WGMMA(columns, count, a0, a1, a2, a3, b)                               \
  template <>                                                                       \
  __device__ __forceinline__ void Wgmma<columns>(                                   \
      float (&d)[columns / 2], const uint32_t (&a)[4], uint64_t desc) {             \
    asm volatile("{.reg .pred adds; setp.eq.b32 adds, 0, 0;"                        \
                 "wgmma.mma_async.sync.aligned.m64n" #columns                       \
                 "k16.f32.bf16.bf16 {" JMX8_N##count "}, {" a0 "," a1 "," a2 "," a3 \
                 "}, " b ", adds, 1, 1, 0;}"                                        \
                 : JMX8_R##count(0)                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc));          \
  }

JMX8_WGMMA(8, 4, "%4", "%5", "%6", "%7", "%8")
JMX8_WGMMA(16, 8, "%8", "%9", "%10", "%11", "%12")
JMX8_WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20")
JMX8_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36")
JMX8_WGMMA(96, 48, "%48", "%49", "%50", "%51", "%52")
JMX8_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68")
JMX8_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132")

}  // namespace jmx8::ptx
