//! A plan reads back as it was written, at the same address each step; nothing else reads as a plan.

use super::*;
use crate::error::{Error, Result};

const LIMITS: PlanLimits = PlanLimits {
    max_num_seqs: 3,
    max_num_tokens: 20,
    max_blocks_per_seq: 4,
    max_table_updates: 12,
    max_block_copies: 6,
    max_blocks_to_zero: 9,
    block_size: 4,
};

/// Two sequences: five tokens of a prompt in blocks 7 and 3, and one token at position 2 of block 5.
fn write(buffer: &mut PlanBuffer) {
    let counts = PlanCounts {
        step: (1 << 32) + 5,
        num_seqs: 2,
        num_tokens: 6,
        num_samples: 1,
        max_query_len: 5,
        max_seq_len: 5,
        width: 2,
        table_updates: 2,
        block_copies: 1,
        blocks_to_zero: 1,
    };
    let plan = buffer.begin(&counts).unwrap();
    plan.input_ids.copy_from_slice(&[10, 11, 12, 13, 14, 99]);
    plan.input_sources.fill(-1);
    plan.positions.copy_from_slice(&[0, 1, 2, 3, 4, 2]);
    plan.query_start_loc.copy_from_slice(&[0, 5, 6]);
    plan.seq_lens.copy_from_slice(&[5, 3]);
    plan.rows.copy_from_slice(&[2, 0]);
    plan.logits_indices.copy_from_slice(&[5]);
    plan.sample_seqs.copy_from_slice(&[0]);
    plan.slot_mapping.copy_from_slice(&[28, 29, 30, 31, 12, 22]);
    plan.table_updates.copy_from_slice(&[2, 0, 7, 2, 1, 3]);
    plan.block_copies.copy_from_slice(&[1, 5]);
    plan.blocks_to_zero.copy_from_slice(&[7]);
    plan.block_table[..2].copy_from_slice(&[7, 3]);
    plan.block_table[plan.row_stride] = 5;
}

/// Memory aligned as `from_buffer` wants it.
fn aligned(bytes: &[u8]) -> Vec<u64> {
    let mut words = vec![0; bytes.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
    words
}

fn read(bytes: &[u8]) -> Result<u64> {
    let words = aligned(bytes);
    StepPlan::from_buffer(&bytemuck::cast_slice(&words)[..bytes.len()]).map(|plan| plan.step())
}

#[test]
fn a_plan_reads_back() {
    let mut buffer = PlanBuffer::new(&LIMITS).unwrap();
    write(&mut buffer);
    let words = aligned(buffer.plan().buffer());
    for plan in [
        buffer.plan(),
        StepPlan::from_buffer(bytemuck::cast_slice(&words)).unwrap(),
    ] {
        assert_eq!(
            (plan.step(), plan.num_seqs(), plan.num_tokens(), plan.num_samples()),
            ((1 << 32) + 5, 2, 6, 1)
        );
        assert_eq!((plan.max_query_len(), plan.max_seq_len(), plan.block_size()), (5, 5, 4));
        assert_eq!(plan.input_ids(), [10, 11, 12, 13, 14, 99]);
        assert_eq!(plan.query_start_loc(), [0, 5, 6]);
        assert_eq!(plan.slot_mapping(), [28, 29, 30, 31, 12, 22]);
        assert_eq!(plan.table_updates(), [2, 0, 7, 2, 1, 3]);
        assert_eq!(
            (plan.block_table().row(0), plan.block_table().row(1)),
            (&[7, 3][..], &[5, 0][..])
        );
        assert_eq!((plan.block_copies(), plan.blocks_to_zero()), (&[1, 5][..], &[7][..]));
        for array in ARRAYS {
            assert_eq!(plan.info(array).offset % 64, 0, "{}", array.name());
            assert_eq!(plan.info(array).array, array);
        }
        assert!(plan.head_bytes() < plan.info(Array::BlockTable).offset);
    }
}

#[test]
fn the_memory_stays_where_it_is() {
    let mut buffer = PlanBuffer::new(&LIMITS).unwrap();
    let address = buffer.memory().as_ptr() as usize;
    assert_eq!(address % 64, 0);
    for _ in 0..3 {
        write(&mut buffer);
        assert_eq!(buffer.plan().buffer().as_ptr() as usize, address);
    }
}

#[test]
fn the_largest_step_fits_and_no_larger_one() {
    let mut buffer = PlanBuffer::new(&LIMITS).unwrap();
    let largest = PlanCounts {
        step: 1,
        num_seqs: 3,
        num_tokens: 20,
        num_samples: 3,
        max_query_len: 16,
        max_seq_len: 16,
        width: 4,
        table_updates: 12,
        block_copies: 6,
        blocks_to_zero: 9,
    };
    let plan = buffer.begin(&largest).unwrap();
    assert_eq!(plan.block_table.len(), 3 * plan.row_stride);
    assert_eq!((plan.table_updates.len(), plan.blocks_to_zero.len()), (36, 9));
    for larger in [
        PlanCounts { width: 17, ..largest },
        PlanCounts {
            blocks_to_zero: 26,
            ..largest
        },
    ] {
        assert!(matches!(buffer.begin(&larger), Err(Error::Corruption { .. })));
    }
}

#[test]
fn a_truncated_plan_is_refused_at_every_length() {
    let mut buffer = PlanBuffer::new(&LIMITS).unwrap();
    write(&mut buffer);
    let plan = buffer.plan();
    for len in 0..plan.buffer().len() {
        assert!(
            matches!(
                read(&plan.buffer()[..len]),
                Err(Error::InvalidArgument { argument: "buffer", .. })
            ),
            "{len}"
        );
    }
    assert_eq!(read(plan.buffer()), Ok(plan.step()));
}

#[test]
fn a_changed_word_is_refused_or_harmless() {
    let mut buffer = PlanBuffer::new(&LIMITS).unwrap();
    write(&mut buffer);
    let bytes = buffer.plan().buffer().to_vec();
    let mut refused = 0;
    for place in (0..bytes.len()).step_by(4) {
        for value in [i32::MIN, -1, 0, 1, i32::MAX] {
            let mut bytes = bytes.clone();
            bytes[place..place + 4].copy_from_slice(&value.to_ne_bytes());
            let words = aligned(&bytes);
            match StepPlan::from_buffer(bytemuck::cast_slice(&words)) {
                Err(_) => refused += 1,
                Ok(plan) => {
                    // Whatever it says, everything it points to is there.
                    for i in 0..plan.num_seqs() {
                        assert!(plan.block_table().row(i).iter().all(|&b| b >= 0));
                    }
                    let tokens = i32::try_from(plan.num_tokens()).unwrap();
                    assert!(plan.logits_indices().iter().all(|index| (0..tokens).contains(index)));
                    assert_eq!(plan.query_start_loc().len(), plan.num_seqs() + 1);
                }
            }
        }
    }
    assert!(refused > 400, "{refused}");
}

#[test]
fn unaligned_memory_is_refused() {
    let words = vec![0_u64; 200];
    let bytes: &[u8] = bytemuck::cast_slice(&words);
    assert!(matches!(
        StepPlan::from_buffer(&bytes[4..]),
        Err(Error::InvalidArgument { got: 4, .. })
    ));
}

#[test]
fn limits_beyond_reason_are_refused() {
    let limits = PlanLimits {
        max_num_seqs: 1 << 20,
        max_blocks_per_seq: 1 << 20,
        ..LIMITS
    };
    let error = PlanBuffer::new(&limits).unwrap_err();
    assert!(
        matches!(
            error,
            Error::InvalidArgument {
                argument: "max_num_seqs",
                ..
            }
        ),
        "{error}"
    );
}
