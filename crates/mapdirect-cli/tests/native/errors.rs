use crate::world::World;
use libtest_mimic::Trial;
pub fn trials(_world: &World) -> Vec<Trial> {
    Vec::new()
}
pub fn play_holder(_: &[String]) -> anyhow::Result<()> {
    Ok(())
}
pub fn play_attacker(_: &[String]) -> anyhow::Result<()> {
    Ok(())
}
pub fn play_mmap(_: &[String]) -> anyhow::Result<()> {
    Ok(())
}
pub fn play_pin(_: &[String]) -> anyhow::Result<()> {
    Ok(())
}
