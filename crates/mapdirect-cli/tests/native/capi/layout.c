/* Says where everything is in the structures of mapdirect.h. */
#include <mapdirect.h>
#include <stdio.h>

#define TELL(of, field)                                                                            \
	printf(#of "." #field " %zu %zu\n", offsetof(struct of, field),                           \
	       sizeof(((struct of *)0)->field))

int main(void)
{
	printf("MAP_DIRECT %#x\n", (unsigned)MAP_DIRECT);
	printf("mapdirect_pin %zu\n", sizeof(mapdirect_pin));
	printf("mapdirect_extent %zu\n", sizeof(struct mapdirect_extent));
	TELL(mapdirect_extent, offset);
	TELL(mapdirect_extent, physical);
	TELL(mapdirect_extent, length);
	TELL(mapdirect_extent, state);
	TELL(mapdirect_extent, device_major);
	TELL(mapdirect_extent, device_minor);
	TELL(mapdirect_extent, reserved);
	printf("mapdirect_state %zu\n", sizeof(struct mapdirect_state));
	TELL(mapdirect_state, state);
	TELL(mapdirect_state, durability);
	TELL(mapdirect_state, pin);
	TELL(mapdirect_state, start);
	TELL(mapdirect_state, end);
	TELL(mapdirect_state, breaches);
	return 0;
}
